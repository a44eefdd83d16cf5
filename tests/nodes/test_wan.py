"""Wan in both hosts, on the same tiny weights: texts, latents, D and gradients are equal, what one trains both load, a
steered picture is the same; kinds that ComfyUI's own loader detects are served or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import both_hosts
import both_hosts_drawn
import pytest
import tiny_folders
import torch
from both_hosts import Hosts, gap
from small_networks import seeded

from onestep.core.adapter_file import save_adapter
from onestep.core.guidance import MODES, Steering
from onestep.core.guidance_adapter import new_adapter
from onestep.core.recipe import Recipe
from onestep.core.schedule import FlowSchedule
from onestep.pipelines import OneStepPipeline, adapt, steered
from onestep.pipelines.encode import encode_text
from onestep.pipelines.load import load

pytestmark = [pytest.mark.broad, pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]

PROMPTS = ["a red dragon", "a wall", "a red dragon on a long wall of stone"]
SIZE = (32, 32)
LAYERS = 6 + 2 * 10
STEERED = ["a red dragon", "a wall of stone", "x"]
"""The prompt, what it is steered away from, and what PERP measures from."""
RECIPE = Recipe.at(FlowSchedule(3.0), torch.tensor([900.0], dtype=torch.float64), family="wan", sizes=((32, 32),))


TIMES = torch.tensor([1000.0, 930.0, 850.0, 600.0], dtype=torch.float64)
EXPERTS = {
    "whole": Recipe.at(FlowSchedule(3.0), TIMES, family="wan"),
    "high": replace(Recipe.at(FlowSchedule(3.0), TIMES[:2], family="wan"), end=850.0),
    "low": Recipe.at(FlowSchedule(3.0), TIMES[2:], family="wan"),
}


@torch.no_grad()
def stirred(folder: Path, work: Path) -> None:
    """A guidance adapter away from its start, in a file in ``work``."""
    module, draw = new_adapter(adapt(load(folder)).denoiser.roles.targets, "wan", 1), seeded(2)
    for _, value in sorted(module.named_parameters()):
        value.add_(0.1 * draw(*value.shape).float())
    save_adapter(work / "guidance.safetensors", module, "wan")


@pytest.fixture(scope="module")
def hosts(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    folder = tiny_folders.wan_folder(tmp_path_factory.mktemp("wan") / "model")
    stirred(folder, folder.parent)
    both_hosts_drawn.control_file(adapt(load(folder)), folder.parent, SIZE)
    runs = both_hosts.RUNS | {"nct": both_hosts_drawn.ADAPTERS["nct"]}
    told = {name: recipe.to_json() for name, recipe in EXPERTS.items()}
    return both_hosts.both(
        run_inside, folder, PROMPTS, "wan", runs=runs, steered=STEERED, recipe=RECIPE.to_json(), **told
    )


def test_prompts_become_the_same_512_tokens(hosts: Hosts) -> None:
    assert hosts.report["family"] == "wan" and hosts.report["blocks"] == 2 and "mask" not in hosts.comfys
    assert hosts.inputs["text"].shape == (3, 512, 24)
    assert gap(hosts.comfys["text"], hosts.inputs["text"]) < 1e-5


def test_d_is_what_comfyui_itself_makes(hosts: Hosts) -> None:
    assert gap(hosts.comfys["base"], hosts.comfys["core"]) < 1e-5


def test_one_expert_draws_on_where_the_other_has_left(hosts: Hosts) -> None:
    """By One-Step Sample twice, and by SamplerCustomAdvanced twice, as all steps at once."""
    drawn = {name.removeprefix("drawn "): value for name, value in hosts.comfys.items() if name.startswith("drawn ")}
    assert gap(drawn["experts"], drawn["whole"]) < 1e-5 and gap(drawn["core experts"], drawn["whole"]) < 1e-5
    assert gap(drawn["core left"], drawn["left"]) < 1e-5 and gap(drawn["left"], drawn["whole"]) > 0.1
    assert (
        "were left at time 850 for another expert to go on from, and this recipe begins at 1000"
        in (hosts.report["of another pair"])
    )


def test_what_comfyuis_own_loader_detects_is_served_or_refused_by_name(hosts: Hosts) -> None:
    """Of image to video nothing but the channels tells; 5B's latents are a 16th of the side."""
    found = hosts.report["detected"]
    assert found["2.1"] == ["wan", 16, [16, 4, 8]] and found["2.2 5B"] == ["wan", 16, [48, 2, 4]]
    assert "takes 36 input channels" in found["image to video"], found
    assert "Wan VACE models cannot be adapted yet" in found["VACE"], found


def test_both_hosts_have_one_schedule(hosts: Hosts) -> None:
    assert hosts.report["schedule"] == repr(hosts.host.denoiser.schedule)


@torch.no_grad()
def test_pictures_become_the_same_latents_and_come_back(hosts: Hosts) -> None:
    host, pictures = hosts.host, hosts.comfys["pictures"]
    latents = host.latents_of(pictures)
    assert latents.shape == (2, 16, 4, 6)
    assert gap(hosts.comfys["latents"], latents) < 1e-5
    assert gap(hosts.comfys["decoded"], host.decode(latents)) < 1e-5


def test_d_and_every_gradient_are_diffusers(hosts: Hosts) -> None:
    both_hosts.check_gradients(hosts, 5e-5)


def test_a_head_sees_the_same_features(hosts: Hosts) -> None:
    both_hosts_drawn.check_features(hosts)


def test_rows_of_several_roles_are_those_of_each_alone(hosts: Hosts) -> None:
    both_hosts.check_rows(hosts)


@pytest.mark.parametrize("method", both_hosts.RUNS)
def test_what_either_host_trains_both_load(method: str, hosts: Hosts) -> None:
    both_hosts.check_trained(hosts, method, PROMPTS, LAYERS)


@torch.no_grad()
def test_a_guidance_adapter_is_the_same_in_both_hosts(hosts: Hosts) -> None:
    pipe = OneStepPipeline.from_pipe(load(hosts.work / "model"))
    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(5))
    pipe.load_guidance_adapter(hosts.work / "guidance.safetensors")
    drawn = pipe(STEERED[0], recipe=RECIPE, latents=noise, output_type="latent").images
    assert gap(hosts.comfys["steered guided"], drawn) < 1e-4
    assert gap(hosts.comfys["steered none"], drawn) > 1e-3


def test_a_control_is_the_same_in_both_hosts_and_of_pictures_alone(hosts: Hosts) -> None:
    both_hosts_drawn.check_control(hosts, STEERED[0], RECIPE, SIZE)
    assert "a video of 2 latent frames: draw one frame" in hosts.report["video"]


@pytest.mark.broad
def test_both_hosts_train_one_control(hosts: Hosts) -> None:
    both_hosts_drawn.check_adapter(hosts, "nct", PROMPTS)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["none", *MODES])
def test_a_steered_picture_is_the_same_in_both_hosts(mode: str, hosts: Hosts) -> None:
    prompt, negative, empty = STEERED
    pipe = OneStepPipeline.from_pipe(load(hosts.work / "model"))
    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(5))
    told = {"recipe": RECIPE, "latents": noise, "output_type": "latent"}
    if mode == "none":
        drawn = pipe(prompt, **told).images
    else:
        plain = pipe.plain()
        cond = {}
        for name, text in {"negative": negative, "empty": empty}.items():
            cond[name] = encode_text(plain, [text], padded=Steering(mode).wants_padding, device="cpu")
        with steered(pipe, cond["negative"], mode, empty=cond["empty"]):
            drawn = pipe(prompt, **told).images
    assert gap(hosts.comfys[f"steered {mode}"], drawn) < 1e-4
    assert mode == "none" or gap(hosts.comfys["steered none"], drawn) > 1e-3
