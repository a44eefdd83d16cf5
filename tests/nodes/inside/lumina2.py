"""lumina2.py FOLDER WORK: a tiny Lumina 2 in ComfyUI (support/comfy_both_hosts.py), for texts of two lengths; features,
x0 steered away from a negative, a picture whose first part the base draws, what a prompt is read behind, and what is
said of variants."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import torch
from comfy_both_hosts import answer, facts, load, measured, seen_by_head, told, trained
from comfy_controlled import controlled
from comfy_drawn import drawn
from comfy_extras.nodes_lumina2 import CLIPTextEncodeLumina2, RenormCFG

from onestep.core.errors import OneStepError
from onestep.nodes.adapt import adapted


def refused(model):
    """What is said of a MODEL."""
    try:
        with adapted(model, clip, vae):
            return ""
    except OneStepError as error:
        return str(error)


def of_newbie(model):
    """What is said of a MODEL with a module that only NewBie has; nothing is copied for it."""
    network = model.model.diffusion_model
    network.clip_text_pooled_proj = torch.nn.Linear(2, 2)
    try:
        return refused(model)
    finally:
        network.clip_text_pooled_proj = None


def texts(host):
    """The first prompt as OneStep reads it, as core's own node does, behind a system prompt of its own, and as a
    negative."""
    prompt = told["prompts"][0]
    ((theirs, _),) = CLIPTextEncodeLumina2.execute(clip, prompt, "superior").args[0]
    own = f"Draw well. <Prompt Start> {prompt}"
    found = {"usual": host.texts([prompt]), "own": host.texts([own]), "negative": host.texts([prompt], negative=True)}
    return {"text/node": theirs, **{f"text/{name}": cond.text for name, cond in found.items()}}


with torch.inference_mode():
    model, clip, vae = load()
    with adapted(model, clip, vae) as host:
        out, again = measured(host)
        out |= seen_by_head(host)
        out |= texts(host)
        report = facts(host, again) | {"token_norm": host.denoiser.token_norm}
    out |= drawn(model, clip) | controlled(model, clip, told["steered"][0][1], torch.zeros(1, 4, 8, 8))
    report["files"] = trained(model, clip, vae)
    report["renorm"] = refused(RenormCFG.execute(model, 100.0, 1.0).args[0])
with torch.inference_mode(False):
    report["newbie"] = of_newbie(model)
answer(out, report)
