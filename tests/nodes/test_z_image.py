"""Z-Image in both hosts, on the same tiny weights: texts, D and gradients are equal, and what one trains both load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import both_hosts
import pytest
import tiny_folders
import torch
from both_hosts import Hosts, gap
from diffusers import DiffusionPipeline
from lora_files import random_lora

from onestep.core import control_copy, guidance_adapter
from onestep.core.adapter_file import load_adapter, read_told
from onestep.core.features import Features
from onestep.core.recipe import Recipe
from onestep.pipelines import diverse
from onestep.pipelines.adapt import denoiser_of
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
SHORT_RUN = {"batch": 2, "steps": 3, "sizes": "32x32", "watch_every": 0, "preview_every": 0, "learning_rate": 0.01}
ADAPTERS: dict[str, dict[str, Any]] = {
    "agd": {**SHORT_RUN, "teacher_steps": 2, "states": 1, "guidance_high": 5.0},
    "nct": {**SHORT_RUN, "pairs": 4, "control": "canny", "control_width": 8, "noise_levels": 2},
}


@pytest.fixture(scope="module")
def hosts(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    work = tmp_path_factory.mktemp("z_image")
    folder = tiny_folders.z_image_folder(work / "model")
    few = random_lora(DiffusionPipeline.from_pretrained(folder), work / "few.safetensors", FOUR, 0.1)
    told: dict[str, Any] = {"runs": both_hosts.RUNS | ADAPTERS, "steered": STEERED, "share": SHARE}
    told["diverse"] = [str(few), SHORT, SEED, BASE_STEPS, GUIDANCE]
    return both_hosts.both(run_inside, folder, PROMPTS, "z_image", **told)


def test_prompts_become_the_same_conditions(hosts: Hosts) -> None:
    inputs, comfys, report = hosts.inputs, hosts.comfys, hosts.report
    assert report["family"] == "z_image" and report["shift"] == 3.0 and report["blocks"] == 4
    assert torch.equal(comfys["mask"], inputs["mask"]) and len(set(inputs["mask"].sum(1).tolist())) == 2
    assert gap(comfys["text"], inputs["text"]) < 1e-5


def test_d_and_every_gradient_are_diffusers_for_texts_of_two_lengths(hosts: Hosts) -> None:
    """One call in diffusers, two in ComfyUI."""
    both_hosts.check_gradients(hosts, 5e-5)


def test_rows_of_several_roles_are_those_of_each_alone(hosts: Hosts) -> None:
    """Texts of two lengths, and one text a row."""
    both_hosts.check_rows(hosts)


@torch.no_grad()
@pytest.mark.parametrize("number", range(len(STEERED)), ids=[mode for mode, *_ in STEERED])
def test_a_negative_steers_both_hosts_alike(number: int, hosts: Hosts) -> None:
    host, inputs, comfys = hosts.host, hosts.inputs, hosts.comfys
    mode, prompt, negative = STEERED[number]
    schedule = host.denoiser.schedule
    sigma = schedule.sigma_at(torch.tensor([1 - SHARE], dtype=torch.float64))
    x, cond = inputs["x"][:1] * sigma.float(), host.encode([prompt], (32, 32))
    plain = host.denoiser(x, sigma, cond)
    with steered(host.pipe, negative, mode):
        found = host.denoiser(x, sigma, cond)
    assert gap(comfys[f"steered/{number}"], found) < 5e-5 and gap(found, plain) > 1e-2


def test_the_base_draws_the_first_part_alike_in_both_hosts(hosts: Hosts) -> None:
    comfys, work = hosts.comfys, hosts.work
    fast = OneStepPipeline.from_pipe(DiffusionPipeline.from_pretrained(work / "model"))
    fast.load_one_step_lora(work / "few.safetensors")
    call: dict[str, Any] = {"seed": SEED, "output_type": "latent"}
    wanted = diverse(fast, SHORT, base_steps=BASE_STEPS, guidance=GUIDANCE, **call).images
    assert gap(comfys["diverse"], wanted) < 1e-4 and gap(fast(SHORT, **call).images, wanted) > 0.1


def test_variants_that_are_not_served_are_refused_by_name(hosts: Hosts) -> None:
    """Before the model is copied, with what is served instead."""
    found = hosts.report["refused"]
    for mark, name in {"siglip_embedder": "Z-Image Omni", "dec_net": "Z-Image in pixels"}.items():
        assert found[mark].startswith(f"{name} models cannot be adapted yet: use ") and "Z-Image" in found[mark][40:]


@torch.no_grad()
def test_a_head_sees_the_same_features(hosts: Hosts) -> None:
    """Of texts of two lengths: one call in diffusers, two in ComfyUI."""
    host, inputs, comfys, cond = hosts.host, hosts.inputs, hosts.comfys, hosts.cond
    roles = host.denoiser.roles
    features = Features(roles.targets, host.blocks, 2, roles.active_here)
    with roles.use("student"), features.kept(inputs["x"]) as found:
        host.denoiser(inputs["x"], inputs["sigma"], cond)
    for name, value in zip(features.names, found, strict=True):
        assert gap(comfys[f"feature/{name}"], value) < 5e-5, name


@pytest.mark.parametrize("method", both_hosts.RUNS)
def test_what_either_host_trains_both_load(method: str, hosts: Hosts) -> None:
    both_hosts.check_trained(hosts, method, PROMPTS, 37)


@pytest.mark.parametrize("method", ADAPTERS)
def test_either_host_trains_the_same_adapter(method: str, hosts: Hosts) -> None:
    """On texts of two lengths: to a twentieth of the way that training has taken it."""
    work, (name, said) = hosts.work, hosts.report["files"][method]
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
def test_the_guidance_of_either_host_draws_alike(hosts: Hosts) -> None:
    host, inputs, report, work, cond = hosts.host, hosts.inputs, hosts.report, hosts.work, hosts.cond
    plain, drawn = denoiser_of(host.pipe)(inputs["x"], inputs["sigma"], cond), []
    for path in (work / "agd" / "result.safetensors", work / "comfy-agd" / report["files"]["agd"][0]):
        with load_guidance_adapter(host.pipe, path, 4.0):
            drawn.append(denoiser_of(host.pipe)(inputs["x"], inputs["sigma"], cond))
    assert gap(drawn[1], drawn[0]) < 0.1 * gap(drawn[0], plain)
