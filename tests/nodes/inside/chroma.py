"""chroma.py FOLDER WORK: a tiny Chroma in ComfyUI (support/comfy_both_hosts.py), its latents, texts of several lengths,
and what is said of another model's text encoder."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import torch
from comfy_both_hosts import COND, answer, facts, given, load, measured, told, trained
from comfy_controlled import controlled
from comfy_drawn import drawn

from onestep.nodes.adapt import adapted


def alone(host):
    """x0 of each row by itself, of its real tokens."""
    x, sigma = given["x"], given["sigma"]
    lengths = COND.mask.sum(1).tolist()
    rows = [(slice(i, i + 1), type(COND)(COND.text[i : i + 1, :length])) for i, length in enumerate(lengths)]
    with torch.no_grad():
        each = [host.denoiser(x[row], sigma[row], cond) for row, cond in rows]
        return {"together": host.denoiser(x, sigma, COND), "alone": torch.cat(each)}


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
