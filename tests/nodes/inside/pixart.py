"""pixart.py FOLDER WORK: a tiny PixArt-Sigma in ComfyUI (support/comfy_both_hosts.py), texts of several lengths, x0
steered away from negatives, and what is said of what it does not draw."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import torch
from comfy_both_hosts import alone, answer, load, measured, seen_by_head, told, trained
from comfy_controlled import controlled
from comfy_drawn import steered

from onestep.core.errors import OneStepError
from onestep.nodes.adapt import adapted


def said(call):
    try:
        call()
    except OneStepError as error:
        return str(error)


with torch.inference_mode():
    model, clip, vae = load()
    with adapted(model, clip, vae) as host:
        out = alone(host)
        more, again = measured(host)
        more |= seen_by_head(host)
        report = {"family": host.family, "blocks": len(host.blocks), "again": again}
        report |= {"small": said(lambda: host.latent_shape((32, 32)))}
        report["training"] = host.network.training or host.network.y_embedder.training
    out |= controlled(model, clip, told["prompts"][0], torch.zeros(1, 4, 40, 40))
    out |= {f"steered/{n}": steered(model, clip, *words) for n, words in enumerate(told["steered"])}
    report["files"] = trained(model, clip, vae)
answer(out | more, report)
