"""Z-Image in both hosts, on the same tiny weights: texts, D and gradients are equal, and what one trains both load."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import tiny_folders
import torch
from diffusers import DiffusionPipeline
from lora_files import random_lora
from safetensors.torch import load_file, save_file

from onestep.core import control_copy, guidance_adapter
from onestep.core.adapter_file import load_adapter, read_told
from onestep.core.cond import Cond
from onestep.core.features import Features
from onestep.core.lora_file import load_lora
from onestep.core.recipe import Recipe
from onestep.pipelines import diverse
from onestep.pipelines.adapt import DiffusersHost, adapt, denoiser_of
from onestep.pipelines.distill import distill
from onestep.pipelines.guidance_adapter import load_guidance_adapter
from onestep.pipelines.one_step import OneStepPipeline
from onestep.pipelines.steer import steered

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]

MAKERS = guidance_adapter.MAKERS | control_copy.MAKERS
PROMPTS = ["a red dragon", "a wall", "a red dragon"]
# Each text is filled up to 32 tokens or, of more words, to 64: the negative is as long as the prompt, longer, shorter.
SHORT, LONG = "a wall", "a red dragon in a storm by the sea"
STEERED = [("nag", SHORT, "red"), ("nasa", SHORT, LONG), ("vsf", LONG, "red"), ("perp", SHORT, LONG)]
SHARE = 0.3
FOUR = Recipe((1000.0, 900.0, 750.0, 500.0), family="z_image", shift=3.0, sizes=((32, 32),))
SEED, BASE_STEPS, GUIDANCE = 7, 8, 3.0
RUN = {"warm_start": 1, "pairs": 2, "batch": 2, "steps": 2, "rank": 2, "sizes": "32x32", "preview_samples": 1}
RUN |= {"teacher_steps": 2, "watch_every": 2, "watch_samples": 4, "preview_every": 2}
RUNS: dict[str, dict[str, Any]] = {
    "regression": {name: value for name, value in RUN.items() if name != "warm_start"},
    "dmd": {**RUN, "critic_warm_up": 1, "critic_updates": 1},
}
SHORT_RUN = {"batch": 2, "steps": 3, "sizes": "32x32", "watch_every": 0, "preview_every": 0, "learning_rate": 0.01}
ADAPTERS: dict[str, dict[str, Any]] = {
    "agd": {**SHORT_RUN, "teacher_steps": 2, "states": 1, "guidance_high": 5.0},
    "nct": {**SHORT_RUN, "pairs": 4, "control": "canny", "control_width": 8, "noise_levels": 2},
}


@pytest.fixture(scope="module")
def hosts(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(diffusers' host, the inputs, what ComfyUI's made of them, its report, the folder of all)."""
    work = tmp_path_factory.mktemp("z_image")
    folder = tiny_folders.z_image_folder(work / "model")
    host = adapt(DiffusionPipeline.from_pretrained(folder))
    inputs = inputs_of(host)
    save_file(inputs, work / "in.safetensors")
    told: dict[str, Any] = {"prompts": PROMPTS, "runs": RUNS | ADAPTERS, "steered": STEERED, "share": SHARE}
    few = random_lora(DiffusionPipeline.from_pretrained(folder), work / "few.safetensors", FOUR, 0.1)
    told["diverse"] = [str(few), SHORT, SEED, BASE_STEPS, GUIDANCE]
    (work / "told.json").write_text(json.dumps(told))
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


def test_the_base_draws_the_first_part_alike_in_both_hosts(hosts: Any) -> None:
    _, _, comfys, _, work = hosts
    fast = OneStepPipeline.from_pipe(DiffusionPipeline.from_pretrained(work / "model"))
    fast.load_one_step_lora(work / "few.safetensors")
    call: dict[str, Any] = {"seed": SEED, "output_type": "latent"}
    wanted = diverse(fast, SHORT, base_steps=BASE_STEPS, guidance=GUIDANCE, **call).images
    assert gap(comfys["diverse"], wanted) < 1e-4 and gap(fast(SHORT, **call).images, wanted) > 0.1


def test_variants_that_are_not_served_are_refused_by_name(hosts: Any) -> None:
    """Before the model is copied, with what is served instead."""
    found = hosts[3]["refused"]
    for mark, name in {"siglip_embedder": "Z-Image Omni", "dec_net": "Z-Image in pixels"}.items():
        assert found[mark].startswith(f"{name} models cannot be adapted yet: use ") and "Z-Image" in found[mark][40:]


@torch.no_grad()
def test_a_head_sees_the_same_features(hosts: Any) -> None:
    """Of texts of two lengths: one call in diffusers, two in ComfyUI."""
    host, inputs, comfys, _, _ = hosts
    roles, cond = host.denoiser.roles, Cond(inputs["text"], mask=inputs["mask"])
    features = Features(roles.targets, host.blocks, 2, roles.active_here)
    with roles.use("student"), features.kept(inputs["x"]) as found:
        host.denoiser(inputs["x"], inputs["sigma"], cond)
    for name, value in zip(features.names, found, strict=True):
        assert gap(comfys[f"feature/{name}"], value) < 5e-5, name


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


@pytest.mark.parametrize("method", ADAPTERS)
def test_either_host_trains_the_same_adapter(method: str, hosts: Any) -> None:
    """On texts of two lengths: to a twentieth of the way that training has taken it."""
    host, _, _, report, work = hosts
    name, said = report["files"][method]
    assert "bit for bit" in said
    pipe = DiffusionPipeline.from_pretrained(work / "model")
    ours = distill(pipe, PROMPTS, method, out=work / method, **ADAPTERS[method])
    files = ours.path, work / f"comfy-{method}" / name
    mine, theirs = (load_adapter(path, MAKERS, "z_image").module for path in files)
    start = type(mine).from_config(**read_told(ours.path)["config"])
    moved = 0.0
    for (layer, one), (_, other), (_, first) in zip(*map(parameters_of, (mine, theirs, start)), strict=True):
        moved += float((one - first).norm())
        assert float((one - other).norm()) < 0.05 * float((one - first).norm()) + 1e-6, layer
    assert moved > 0


def parameters_of(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, value.detach()) for name, value in module.named_parameters()]


@torch.no_grad()
def test_the_guidance_of_either_host_draws_alike(hosts: Any) -> None:
    host, inputs, _, report, work = hosts
    cond = Cond(inputs["text"], mask=inputs["mask"])
    plain, drawn = denoiser_of(host.pipe)(inputs["x"], inputs["sigma"], cond), []
    for path in (work / "agd" / "result.safetensors", work / "comfy-agd" / report["files"]["agd"][0]):
        with load_guidance_adapter(host.pipe, path, 4.0):
            drawn.append(denoiser_of(host.pipe)(inputs["x"], inputs["sigma"], cond))
    assert gap(drawn[1], drawn[0]) < 0.1 * gap(drawn[0], plain)
