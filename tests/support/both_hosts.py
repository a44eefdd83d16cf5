"""A tiny model's folder in diffusers' host and, by comfy_both_hosts.py, in ComfyUI's: what must be equal."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from onestep.core.cond import Cond
from onestep.core.lora_file import load_lora
from onestep.core.lora_second import second_file
from onestep.pipelines.adapt import DiffusersHost, adapt
from onestep.pipelines.distill import distill
from onestep.pipelines.load import load

RUN = {"warm_start": 1, "pairs": 2, "batch": 2, "steps": 2, "rank": 2, "sizes": "32x32", "preview_samples": 1}
RUN |= {"teacher_steps": 2, "watch_every": 2, "watch_samples": 4, "preview_every": 2}
RUNS: dict[str, dict[str, Any]] = {
    "regression": {name: value for name, value in RUN.items() if name != "warm_start"},
    "dmd": {**RUN, "critic_warm_up": 1, "critic_updates": 1},
}


@dataclass
class Hosts:
    """host: diffusers'. inputs: what both were given. comfys: the tensors that ComfyUI's made of them. report: what it
    says. work: the folder of all."""

    host: DiffusersHost
    inputs: dict[str, Tensor]
    comfys: dict[str, Tensor]
    report: dict[str, Any]
    work: Path

    @property
    def cond(self) -> Cond:
        return Cond(self.inputs["text"], mask=self.inputs.get("mask"))


def both(
    run_inside: Callable[..., str],
    folder: Path,
    prompts: Sequence[str],
    script: str = "both_hosts",
    size: tuple[int, int] = (32, 32),
    **told: Any,
) -> Hosts:
    """Three prompts, at three levels. size: of the pictures. told: what ``script`` of tests/nodes/inside is told
    besides."""
    host = adapt(load(folder))
    inputs, work = inputs_of(host, prompts, size), folder.parent
    save_file(inputs, work / "in.safetensors")
    (work / "told.json").write_text(json.dumps({"prompts": list(prompts), "runs": RUNS} | told))
    run_inside(script, folder, work)
    report = json.loads((work / "report.json").read_text())
    return Hosts(host, inputs, load_file(work / "out.safetensors"), report, work)


def inputs_of(host: DiffusersHost, prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Tensor]:
    draw, cond = torch.Generator().manual_seed(0), host.encode(prompts, size)
    shape = (len(prompts), *host.latent_shape(size))
    inputs = {"text": cond.text, "sigma": torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)}
    inputs |= {} if cond.mask is None else {"mask": cond.mask}
    inputs |= {name: torch.randn(shape, generator=draw) for name in ("x", "weight")}
    host.denoiser.roles.add("student", 3, 7)
    for name, (a, b) in host.denoiser.roles.state("student").items():
        inputs |= {f"A/{name}": a, f"B/{name}": b.copy_(torch.randn(b.shape, generator=draw) * 0.3)}
    return {name: value.clone().contiguous() for name, value in inputs.items()}


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def check_gradients(hosts: Hosts, tolerance: float, silent: Sequence[str] = ()) -> None:
    """D and the gradient of every factor in ComfyUI are diffusers'; to the bit the same where blocks are computed
    again. silent: layers whose answer goes nowhere."""
    host, inputs, comfys = hosts.host, hosts.inputs, hosts.comfys
    roles = host.denoiser.roles
    with roles.use("student"):
        x0 = host.denoiser(inputs["x"], inputs["sigma"], hosts.cond)
    loss, factors = (inputs["weight"] * x0).sum(), roles.parameters("student")
    gradients = torch.autograd.grad(loss, factors, allow_unused=True, materialize_grads=True)
    assert gap(comfys["x0"], x0.detach()) < tolerance
    assert hosts.report["again"]
    assert {name.partition("/")[2] for name in hosts.report["missing"]} == {*silent}
    names = [f"{kind}/{name}" for name in sorted(roles.targets) for kind in "AB"]
    scale = max(float(gradient.norm()) for gradient in gradients)
    for name, gradient in zip(names, gradients, strict=True):
        least = tolerance * max(float(gradient.norm()), 1e-2 * scale)
        assert float((comfys[name] - gradient).norm()) < least, name


@torch.no_grad()
def check_rows(hosts: Hosts) -> None:
    """Whatever is one call, each row is its own role's."""
    host, inputs, cond = hosts.host, hosts.inputs, hosts.cond
    roles = host.denoiser.roles

    def asked(rows: slice) -> Tensor:
        return host.denoiser(inputs["x"][rows], inputs["sigma"][rows], cond[rows])

    with roles.rows([("teacher", 1), ("student", 2)]):
        mixed = asked(slice(None))
    teacher = asked(slice(0, 1))
    with roles.use("student"):
        student = torch.cat([asked(slice(i, i + 1)) for i in (1, 2)])
        assert gap(asked(slice(0, 1)), teacher) > 0.1
    assert gap(mixed, torch.cat([teacher, student])) < 1e-5 and gap(hosts.comfys["mixed"], mixed) < 5e-5


def check_trained(hosts: Hosts, method: str, prompts: Sequence[str], layers: int, **more: Any) -> None:
    """Each host's own loader finds all ``layers`` of what the other trained, and both students are nearly equal. more:
    settings beside those of RUNS, which ComfyUI was told too."""
    name, said = hosts.report["files"][method]
    theirs = hosts.work / f"comfy-{method}" / name
    assert f"loads all {layers} layers" in said
    for_diffusers = second_file(theirs, hosts.host.family, "comfyui") or theirs
    assert f"loads all {layers} layers" in hosts.host.check_file(for_diffusers)
    pipe = load(hosts.work / "model")
    ours = distill(pipe, prompts, method, out=hosts.work / method, **RUNS[method] | more)
    assert f"all {layers} layers" in ours.check and ours.recipe.family == hosts.host.family
    mine, other = (load_lora(path, family=hosts.host.family).state for path in (ours.path, theirs))
    assert mine.keys() == other.keys()
    for layer in mine:
        products = [b.flatten(1).double() @ a.flatten(1).double() for a, b in (mine[layer], other[layer])]
        assert float((products[1] - products[0]).norm()) <= 0.05 * float(products[0].norm()), layer
