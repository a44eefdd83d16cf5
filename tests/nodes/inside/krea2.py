"""krea2.py FOLDER WORK: a tiny Krea 2 in ComfyUI (support/comfy_both_hosts.py), its latents, and texts of several
lengths, a call each."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import torch
from comfy_both_hosts import alone, answer, facts, load, measured, told, trained
from comfy_controlled import controlled
from comfy_drawn import drawn

from onestep.nodes.adapt import adapted


def pictures(host):
    """Pictures, their latents, and what these are decoded to."""
    made = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    latents = host.latents_of(made)
    return {"pictures": made, "latents": latents, "decoded": host.decode(latents)}


with torch.inference_mode():
    model, clip, vae = load()
    seen = drawn(model, clip) | controlled(model, clip, told["prompts"][0], torch.zeros(1, 16, 1, 4, 4))
    with adapted(model, clip, vae) as host:
        out = alone(host) | pictures(host)
        more, again = measured(host)
        report = facts(host, again)
    report["files"] = trained(model, clip, vae)
answer(seen | out | more, report)
