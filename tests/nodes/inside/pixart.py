"""pixart.py FOLDER WORK: a tiny PixArt-Sigma in ComfyUI (support/comfy_both_hosts.py), texts of several lengths, and
what is said of what it does not draw or serve."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import torch
from comfy_both_hosts import alone, answer, load, measured, seen_by_head, told, trained
from comfy_controlled import controlled

from onestep.core.errors import OneStepError
from onestep.core.guidance import Steering
from onestep.nodes.adapt import adapted
from onestep.nodes.steer import steered_model


def said(call):
    try:
        call()
    except OneStepError as error:
        return str(error)


with torch.inference_mode():
    model, clip, vae = load()
    negative = clip.encode_from_tokens_scheduled(clip.tokenize("red"))
    steered = said(lambda: steered_model(model, negative, Steering("nag")))
    with adapted(model, clip, vae) as host:
        out = alone(host)
        more, again = measured(host)
        more |= seen_by_head(host)
        report = {"family": host.family, "blocks": len(host.blocks), "again": again}
        report |= {"small": said(lambda: host.latent_shape((32, 32))), "steered": steered}
        report["training"] = host.network.training or host.network.y_embedder.training
    out |= controlled(model, clip, told["prompts"][0], torch.zeros(1, 4, 40, 40))
    report["files"] = trained(model, clip, vae)
answer(out | more, report)
