"""z_image.py FOLDER WORK: a tiny Z-Image in ComfyUI (support/comfy_both_hosts.py), for texts of two lengths; features,
x0 steered away from a negative, a picture whose first part the base draws, and what is said of variants."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import torch
from comfy_both_hosts import answer, facts, load, measured, seen_by_head, trained
from comfy_drawn import drawn

from onestep.core.errors import OneStepError
from onestep.nodes.adapt import adapted


def refused(model, mark):
    """What is said of a MODEL with a module of this name, which only a variant has; nothing is copied for it."""
    network = model.model.diffusion_model
    setattr(network, mark, torch.nn.Linear(2, 2))
    try:
        with adapted(model, clip, vae):
            return ""
    except OneStepError as error:
        return str(error)
    finally:
        delattr(network, mark)


with torch.inference_mode():
    model, clip, vae = load()
    with adapted(model, clip, vae) as host:
        out, again = measured(host)
        out |= seen_by_head(host)
        report = facts(host, again)
    out |= drawn(model, clip)
    report["files"] = trained(model, clip, vae)
with torch.inference_mode(False):
    report["refused"] = {mark: refused(model, mark) for mark in ("siglip_embedder", "dec_net")}
answer(out, report)
