"""The ComfyUI half of support/both_hosts.py: a tiny model's folder there. WORK/told.json and in.safetensors are what
it is asked, WORK/out.safetensors and report.json what it answers."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from onestep.core.checkpoint import checkpoint_blocks, clone_inputs
from onestep.core.cond import Cond
from onestep.core.features import Features
from onestep.core.recomputed import GRADES, recomputed
from onestep.nodes.adapt import adapted
from onestep.nodes.tiny_models.model import load_tiny
from onestep.training.distil import distil
from onestep.training.presets import preset

FOLDER, WORK = Path(sys.argv[1]), Path(sys.argv[2])
told = json.loads((WORK / "told.json").read_text())
# copies: where a tensor lies in a file, and not where torch would put it, products are summed in another order
given = {name: value.clone() for name, value in load_file(WORK / "in.safetensors").items()}
COND = Cond(given["text"], mask=given.get("mask"))


def load():
    """(MODEL, CLIP, VAE)."""
    return load_tiny(FOLDER)


def gradients(host, grade):
    roles = host.denoiser.roles
    with roles.use("student"), clone_inputs(host.in_place), checkpoint_blocks(recomputed(host.blocks, grade), roles):
        x0 = host.denoiser(given["x"], given["sigma"], COND)
        loss, factors = (given["weight"] * x0).sum(), roles.parameters("student")
        found = torch.autograd.grad(loss, factors, allow_unused=True, materialize_grads=True)
    return x0.detach(), found


def alone(host):
    """x0 of all rows together, and of each by itself, of its real tokens: of a family that masks its texts."""
    x, sigma = given["x"], given["sigma"]
    lengths = COND.mask.sum(1).tolist()
    rows = [(slice(i, i + 1), Cond(COND.text[i : i + 1, :length])) for i, length in enumerate(lengths)]
    with torch.no_grad():
        each = [host.denoiser(x[row], sigma[row], cond) for row, cond in rows]
        return {"together": host.denoiser(x, sigma, COND), "alone": torch.cat(each)}


@contextmanager
def students(host):
    """Within, the student has the given factors."""
    roles = host.denoiser.roles
    with host.training():
        roles.load("student", {name: (given[f"A/{name}"], given[f"B/{name}"]) for name in roles.targets})
        roles.install()
        yield
        roles.drop("student")


def measured(host):
    """(texts, D, rows of two roles, every gradient; whether the blocks computed again give the same to the bit)."""
    cond = host.encode(told["prompts"], (32, 32))
    out = {"text": cond.text} | ({} if cond.mask is None else {"mask": cond.mask})
    roles = host.denoiser.roles
    with students(host):
        (out["x0"], plain), *others = (gradients(host, grade) for grade in GRADES)
        again = all(torch.equal(a, b) for _, found in others for a, b in zip(plain, found, strict=True))
        with torch.no_grad(), roles.rows([("teacher", 1), ("student", 2)]):
            out["mixed"] = host.denoiser(given["x"], given["sigma"], COND)
        out |= dict(zip([f"{kind}/{name}" for name in sorted(roles.targets) for kind in "AB"], plain, strict=True))
    return out, again


def seen_by_head(host):
    """What a discriminator's head would see of the student."""
    roles = host.denoiser.roles
    found = Features(roles.targets, host.blocks, 2, roles.active_here)
    with students(host), torch.no_grad(), roles.use("student"), found.kept(given["x"]) as values:
        host.denoiser(given["x"], given["sigma"], COND)
    return {f"feature/{name}": value for name, value in zip(found.names, values, strict=True)}


def facts(host, again):
    """What a report says of the host."""
    schedule = host.denoiser.schedule
    told = {"family": host.family, "shift": schedule.shift, "schedule": repr(schedule)}
    return told | {"blocks": len(host.blocks), "again": again}


def trained(model, clip, vae):
    """A short run of each method: its file and what is said of it."""
    files = {}
    for method, settings in told["runs"].items():
        with adapted(model, clip, vae) as host:
            how = preset(None, **{"method": method, **settings})
            made = distil(host, told["prompts"], how, WORK / f"comfy-{method}")
            files[method] = [made.path.name, made.check]
    return files


def answer(out, report):
    """Written where the test looks."""
    report["missing"] = [name for name, value in out.items() if not bool(value.any())]
    with torch.inference_mode(False):
        save_file({name: value.detach().clone().contiguous() for name, value in out.items()}, WORK / "out.safetensors")
    (WORK / "report.json").write_text(json.dumps(report))
