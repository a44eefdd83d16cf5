"""qwen.py FOLDER WORK: a tiny Qwen-Image in ComfyUI (support/comfy_both_hosts.py), its latents, and texts of several
lengths under a mask."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import torch
from comfy_both_hosts import alone, answer, facts, load, measured, told, trained
from comfy_controlled import controlled
from comfy_drawn import drawn

from onestep.core.errors import OneStepError
from onestep.nodes.adapt import adapted


def pictures(host):
    """Pictures, their latents, and what these are decoded to."""
    made = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    latents = host.latents_of(made)
    return {"pictures": made, "latents": latents, "decoded": host.decode(latents)}


def refused(host):
    try:
        host.latent_shape((1328, 1328))
    except OneStepError as error:
        return str(error)


def named_edit(model, clip, vae):
    """What is said of the same weights from a file of this name."""
    kept = model.cached_patcher_init
    model.cached_patcher_init = (kept and kept[0], ("/models/qwen_image_edit_2509_fp8.safetensors",))
    try:
        with adapted(model, clip, vae):
            return ""
    except OneStepError as error:
        return str(error)
    finally:
        model.cached_patcher_init = kept


with torch.inference_mode():
    model, clip, vae = load()
    seen = drawn(model, clip) | controlled(model, clip, told["prompts"][0], torch.zeros(1, 16, 1, 4, 4))
    with adapted(model, clip, vae) as host:
        out = alone(host) | pictures(host)
        more, again = measured(host)
        report = facts(host, again) | {"refused": refused(host), "token_norm": host.denoiser.token_norm}
    report["files"], report["edit"] = trained(model, clip, vae), named_edit(model, clip, vae)
answer(seen | out | more, report)
