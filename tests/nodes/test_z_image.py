"""Z-Image in both hosts, on the same tiny weights: texts, D and gradients are equal, and what one trains both load."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import tiny_folders
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from onestep.core.cond import Cond
from onestep.core.lora_file import load_lora
from onestep.pipelines.adapt import DiffusersHost, adapt
from onestep.pipelines.distill import distill
from onestep.pipelines.steer import steered

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]

PROMPTS = ["a red dragon", "a wall", "a red dragon"]
# Each text is filled up to 32 tokens or, of more words, to 64: the negative is as long as the prompt, longer, shorter.
SHORT, LONG = "a wall", "a red dragon in a storm by the sea"
STEERED = [("nag", SHORT, "red"), ("nasa", SHORT, LONG), ("vsf", LONG, "red"), ("perp", SHORT, LONG)]
SHARE = 0.3
RUN = {"warm_start": 1, "pairs": 2, "batch": 2, "steps": 2, "rank": 2, "sizes": "32x32", "preview_samples": 1}
RUN |= {"teacher_steps": 2, "watch_every": 2, "watch_samples": 4, "preview_every": 2}
RUNS: dict[str, dict[str, Any]] = {
    "regression": {name: value for name, value in RUN.items() if name != "warm_start"},
    "dmd": {**RUN, "critic_warm_up": 1, "critic_updates": 1},
}


@pytest.fixture(scope="module")
def hosts(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(diffusers' host, the inputs, what ComfyUI's made of them, its report, the folder of all)."""
    work = tmp_path_factory.mktemp("z_image")
    folder = tiny_folders.z_image_folder(work / "model")
    host = adapt(DiffusionPipeline.from_pretrained(folder))
    inputs = inputs_of(host)
    save_file(inputs, work / "in.safetensors")
    (work / "told.json").write_text(json.dumps({"prompts": PROMPTS, "runs": RUNS, "steered": STEERED, "share": SHARE}))
    run_inside("z_image", folder, work)
    report = json.loads((work / "report.json").read_text())
    return host, inputs, load_file(work / "out.safetensors"), report, work


def inputs_of(host: DiffusersHost) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    cond = host.encode(PROMPTS, (32, 32))
    assert cond.mask is not None
    shape = (len(PROMPTS), *host.latent_shape((32, 32)))
    inputs = {"text": cond.text, "mask": cond.mask, "sigma": torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)}
    inputs |= {name: torch.randn(shape, generator=draw) for name in ("x", "weight")}
    host.denoiser.roles.add("student", 3, 7)
    for name, (a, b) in host.denoiser.roles.state("student").items():
        inputs |= {f"A/{name}": a, f"B/{name}": b.copy_(torch.randn(b.shape, generator=draw) * 0.3)}
    return {name: value.clone().contiguous() for name, value in inputs.items()}


def gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_prompts_become_the_same_conditions(hosts: Any) -> None:
    _, inputs, comfys, report, _ = hosts
    assert report["family"] == "z_image" and report["shift"] == 3.0 and report["blocks"] == 4
    assert torch.equal(comfys["mask"], inputs["mask"]) and len(set(inputs["mask"].sum(1).tolist())) == 2
    assert gap(comfys["text"], inputs["text"]) < 1e-5


def test_d_and_every_gradient_are_diffusers_for_texts_of_two_lengths(hosts: Any) -> None:
    """One call in diffusers, two in ComfyUI; in each host the same to the bit where blocks are computed again."""
    host, inputs, comfys, report, _ = hosts
    roles, cond = host.denoiser.roles, Cond(inputs["text"], mask=inputs["mask"])
    with roles.use("student"):
        x0 = host.denoiser(inputs["x"], inputs["sigma"], cond)
    gradients = torch.autograd.grad((inputs["weight"] * x0).sum(), roles.parameters("student"))
    assert gap(comfys["x0"], x0.detach()) < 5e-5 and report["again"] and report["missing"] == []
    names = [f"{kind}/{name}" for name in sorted(roles.targets) for kind in "AB"]
    scale = max(float(gradient.norm()) for gradient in gradients)
    for name, gradient in zip(names, gradients, strict=True):
        assert float((comfys[name] - gradient).norm()) < 5e-5 * max(float(gradient.norm()), 1e-2 * scale), name


@torch.no_grad()
def test_rows_of_several_roles_are_those_of_each_alone(hosts: Any) -> None:
    """Texts of two lengths, and one text a row: whatever is one call, each row is its own role's."""
    host, inputs, comfys, _, _ = hosts
    roles, cond = host.denoiser.roles, Cond(inputs["text"], mask=inputs["mask"])

    def asked(rows: slice) -> torch.Tensor:
        return host.denoiser(inputs["x"][rows], inputs["sigma"][rows], cond[rows])

    with roles.rows([("teacher", 1), ("student", 2)]):
        mixed = asked(slice(None))
    teacher = asked(slice(0, 1))
    with roles.use("student"):
        student = torch.cat([asked(slice(i, i + 1)) for i in (1, 2)])
        assert gap(asked(slice(0, 1)), teacher) > 0.1
    assert gap(mixed, torch.cat([teacher, student])) < 1e-5 and gap(comfys["mixed"], mixed) < 5e-5


@torch.no_grad()
@pytest.mark.parametrize("number", range(len(STEERED)), ids=[mode for mode, *_ in STEERED])
def test_a_negative_steers_both_hosts_alike(number: int, hosts: Any) -> None:
    host, inputs, comfys, _, _ = hosts
    mode, prompt, negative = STEERED[number]
    schedule = host.denoiser.schedule
    sigma = schedule.sigma_at(torch.tensor([1 - SHARE], dtype=torch.float64))
    x, cond = inputs["x"][:1] * sigma.float(), host.encode([prompt], (32, 32))
    plain = host.denoiser(x, sigma, cond)
    with steered(host.pipe, negative, mode):
        found = host.denoiser(x, sigma, cond)
    assert gap(comfys[f"steered/{number}"], found) < 5e-5 and gap(found, plain) > 1e-2


@pytest.mark.parametrize("method", RUNS)
def test_what_either_host_trains_both_load(method: str, hosts: Any) -> None:
    """Each compares the deltas by its own loader; the student of the one host in the other has equal factors."""
    host, _, _, report, work = hosts
    name, said = report["files"][method]
    assert "loads all 37 layers" in said
    assert "loads all 37 layers" in host.check_file(work / f"comfy-{method}" / name)
    pipe = DiffusionPipeline.from_pretrained(work / "model")
    ours = distill(pipe, PROMPTS, method, out=work / method, **RUNS[method])
    assert "all 37 layers" in ours.check and ours.recipe.family == "z_image"
    mine, theirs = (load_lora(path).state for path in (ours.path, work / f"comfy-{method}" / name))
    assert mine.keys() == theirs.keys()
    for layer in mine:
        products = [b.double() @ a.double() for a, b in (mine[layer], theirs[layer])]
        assert gap(products[1], products[0]) < 0.05, layer
