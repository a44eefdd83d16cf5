"""chroma.py FOLDER WORK: a tiny Chroma in ComfyUI (support/comfy_both_hosts.py), its latents, texts of several lengths,
and what is said of another model's text encoder."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import torch
from comfy_both_hosts import alone, answer, facts, given, load, measured, told, trained
from comfy_controlled import controlled
from comfy_drawn import drawn

from onestep.nodes.adapt import adapted


def pictures(host):
    """Pictures, their latents, and what these are decoded to."""
    made = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    latents = host.latents_of(made)
    return {"pictures": made, "latents": latents, "decoded": host.decode(latents)}


with torch.inference_mode():
    model, clip, vae = load()
    seen = drawn(model, clip) | controlled(model, clip, told["prompts"][0], torch.zeros_like(given["x"][:1]))
    with adapted(model, clip, vae) as host:
        out = alone(host) | pictures(host)
        more, again = measured(host)
        report = facts(host, again) | {"guidance": host.denoiser.guidance}
    report["files"] = trained(model, clip, vae)
answer(seen | out | more, report)
