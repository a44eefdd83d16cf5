"""both_hosts.py FOLDER WORK: a tiny model's folder in ComfyUI. WORK/in.safetensors: inputs and adapters;
WORK/out.safetensors: its texts, latents, D and every gradient, checkpointed or not. Then a short run of each method."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from onestep.core.checkpoint import checkpoint_blocks, clone_inputs
from onestep.core.cond import Cond
from onestep.core.recomputed import GRADES, recomputed
from onestep.nodes.adapt import adapted
from onestep.nodes.denoiser import in_front
from onestep.nodes.tiny_models.model import load_tiny
from onestep.training.distil import distil
from onestep.training.presets import preset

FOLDER, WORK = Path(sys.argv[1]), Path(sys.argv[2])
told = json.loads((WORK / "told.json").read_text())
given = load_file(WORK / "in.safetensors")
COND = Cond(given["text"], mask=given.get("mask"))


def gradients(host, grade):
    roles = host.denoiser.roles
    with roles.use("student"), clone_inputs(host.in_place), checkpoint_blocks(recomputed(host.blocks, grade), roles):
        x0 = host.denoiser(given["x"], given["sigma"], COND)
        found = torch.autograd.grad((given["weight"] * x0).sum(), roles.parameters("student"))
    return x0.detach(), found


def filled(host):
    """x0 of texts of 3 and 5 tokens, as the model itself fills them up, each alone, and as ours does, together."""
    texts = [given["text"][:1, :length] for length in (3, 5)]
    cond = in_front(Cond.concat([Cond(text) for text in texts]), 512)
    x, sigma = given["x"][:2], given["sigma"][:2]
    with torch.no_grad():
        alone = [host.denoiser(x[i : i + 1], sigma[i : i + 1], Cond(text)) for i, text in enumerate(texts)]
        return {"filled": host.denoiser(x, sigma, cond), "filled/alone": torch.cat(alone), "filled/text": cond.text}


def measured(host):
    cond = host.encode(told["prompts"], (32, 32))
    out = {"text": cond.text} | ({} if cond.mask is None else {"mask": cond.mask})
    draw = torch.Generator().manual_seed(3)
    out["pictures"] = torch.rand(2, 3, 32, 48, generator=draw)
    out["latents"] = host.latents_of(out["pictures"])
    out["decoded"] = host.decode(out["latents"])
    roles = host.denoiser.roles
    if host.family == "flux2":
        out |= filled(host)
    with host.training():
        names = sorted(roles.targets)
        roles.load("student", {name: (given[f"A/{name}"], given[f"B/{name}"]) for name in names})
        roles.install()
        (out["x0"], plain), *others = (gradients(host, grade) for grade in GRADES)
        again = all(torch.equal(a, b) for _, found in others for a, b in zip(plain, found, strict=True))
        with torch.no_grad(), roles.rows([("teacher", 1), ("student", 2)]):
            out["mixed"] = host.denoiser(given["x"], given["sigma"], COND)
        out |= dict(zip([f"{kind}/{name}" for name in names for kind in "AB"], plain, strict=True))
        roles.drop("student")
    return out, again


with torch.inference_mode():
    model, clip, vae = load_tiny(FOLDER)
    with adapted(model, clip, vae) as host:
        out, again = measured(host)
        schedule = host.denoiser.schedule
        report = {
            "family": host.family,
            "shift": schedule.shift,
            "schedule": repr(schedule),
            "blocks": len(host.blocks),
            "again": again,
        }
        report |= {"missing": [name for name, value in out.items() if not bool(value.any())], "files": {}}
    for method, settings in told["runs"].items():
        with adapted(model, clip, vae) as host:
            made = distil(host, told["prompts"], preset(None, method=method, **settings), WORK / f"comfy-{method}")
            report["files"][method] = [made.path.name, made.check]
with torch.inference_mode(False):
    save_file({name: value.detach().clone().contiguous() for name, value in out.items()}, WORK / "out.safetensors")
(WORK / "report.json").write_text(json.dumps(report))
