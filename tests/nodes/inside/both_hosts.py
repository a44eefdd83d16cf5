"""both_hosts.py FOLDER WORK: a tiny model's folder in ComfyUI (support/comfy_both_hosts.py), its latents, texts
that the model itself fills up, and what it draws."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import torch
from comfy_both_hosts import answer, facts, given, load, measured, told, trained
from comfy_drawn import drawn

from onestep.core.cond import Cond
from onestep.nodes.adapt import adapted
from onestep.nodes.denoiser import in_front


def filled(host):
    """x0 of texts of 3 and 5 tokens, as the model itself fills them up, each alone, and as ours does, together."""
    texts = [given["text"][:1, :length] for length in (3, 5)]
    cond = in_front(Cond.concat([Cond(text) for text in texts]), 512)
    x, sigma = given["x"][:2], given["sigma"][:2]
    with torch.no_grad():
        alone = [host.denoiser(x[i : i + 1], sigma[i : i + 1], Cond(text)) for i, text in enumerate(texts)]
        return {"filled": host.denoiser(x, sigma, cond), "filled/alone": torch.cat(alone), "filled/text": cond.text}


def pictures(host):
    """Pictures, their latents, and what these are decoded to."""
    made = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    latents = host.latents_of(made)
    return {"pictures": made, "latents": latents, "decoded": host.decode(latents)}


with torch.inference_mode():
    model, clip, vae = load()
    with adapted(model, clip, vae) as host:
        out = filled(host) | pictures(host)
        more, again = measured(host)
        report = facts(host, again)
    if "steered" in told:
        more |= drawn(model, clip)
    report["files"] = trained(model, clip, vae)
answer(out | more, report)
