"""Anima in both hosts, on the same tiny weights: texts, latents, D and gradients are equal, and what one trains both
load; in ComfyUI D and its text are those of core's own ops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import both_hosts
import both_hosts_drawn
import pytest
import tiny_folders
import torch
from both_hosts import Hosts, gap
from safetensors.torch import load_file, save_file
from small_networks import seeded

from onestep.core import control
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
LAYERS = 6 + 2 * 16
NEGATIVE = {"negative": "a dull wall"}
"""Of an empty text diffusers makes zeros, and ComfyUI what its encoder makes of a padding token."""

STEERED = ["a red dragon", "a wall of stone", "x"]
"""The prompt, what it is steered away from, and what PERP measures from."""
RECIPE = Recipe.at(FlowSchedule(3.0), torch.tensor([900.0], dtype=torch.float64), family="anima", sizes=((32, 32),))
TWO = Recipe.for_student(FlowSchedule(3.0), 2, "anima", ((32, 32),))


@torch.no_grad()
def stirred(folder: Path, work: Path) -> None:
    """A guidance and a control adapter away from their starts, each in a file of its kind's name in ``work``."""
    targets, draw = adapt(load(folder)).denoiser.roles.targets, seeded(2)
    made = {"guidance": new_adapter(targets, "anima", 1)}
    made["control"] = control.new_adapter("anima", targets, ("canny", 1), (32, 32), (16, 4, 4), width=16)
    save_file(
        {"picture": torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(4))}, work / "picture.safetensors"
    )
    for name, module in made.items():
        for _, value in sorted(module.named_parameters()):
            value.add_(0.1 * draw(*value.shape).float())
        save_adapter(work / f"{name}.safetensors", module, "anima")


@pytest.fixture(scope="module")
def hosts(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    folder = tiny_folders.anima_folder(tmp_path_factory.mktemp("anima") / "model")
    runs = {method: {**told, **NEGATIVE} for method, told in both_hosts.RUNS.items()}
    stirred(folder, folder.parent)
    told = {"runs": runs, "steered": STEERED, "recipe": RECIPE.to_json()}
    told |= both_hosts_drawn.diverse_told(folder, TWO, PROMPTS[0], **NEGATIVE)
    return both_hosts.both(run_inside, folder, PROMPTS, "anima", **told)


def test_prompts_become_the_same_512_tokens(hosts: Hosts) -> None:
    assert hosts.report["family"] == "anima" and hosts.report["blocks"] == 2 and "mask" not in hosts.comfys
    assert hosts.inputs["text"].shape == (3, 512, 24)
    assert gap(hosts.comfys["text"], hosts.inputs["text"]) < 1e-5


def test_d_and_its_text_are_what_comfyui_itself_makes(hosts: Hosts) -> None:
    """Its rotary embedding by torch, its adapter run once: core's own run it at each step of a sampler."""
    assert torch.equal(hosts.comfys["text"], hosts.comfys["core text"])
    assert gap(hosts.comfys["base"], hosts.comfys["core"]) < 1e-5


def test_another_models_encoder_is_refused_with_what_to_load(hosts: Hosts) -> None:
    assert "gives no token ids" in hosts.report["refused"] and "load Anima's Qwen3-0.6B" in hosts.report["refused"]


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


def test_rows_of_several_roles_are_those_of_each_alone(hosts: Hosts) -> None:
    both_hosts.check_rows(hosts)


@pytest.mark.parametrize("method", both_hosts.RUNS)
def test_what_either_host_trains_both_load(method: str, hosts: Hosts) -> None:
    both_hosts.check_trained(hosts, method, PROMPTS, LAYERS, **NEGATIVE)


@torch.no_grad()
def test_a_guidance_adapter_is_the_same_in_both_hosts(hosts: Hosts) -> None:
    pipe = OneStepPipeline.from_pipe(load(hosts.work / "model"))
    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(5))
    pipe.load_guidance_adapter(hosts.work / "guidance.safetensors")
    drawn = pipe(STEERED[0], recipe=RECIPE, latents=noise, output_type="latent").images
    assert gap(hosts.comfys["steered guided"], drawn) < 1e-4
    assert gap(hosts.comfys["steered none"], drawn) > 1e-3


@torch.no_grad()
def test_a_control_is_the_same_in_both_hosts(hosts: Hosts) -> None:
    """Its features are added where the picture's tokens enter."""
    pipe = OneStepPipeline.from_pipe(load(hosts.work / "model"))
    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(5))
    pipe.load_control(hosts.work / "control.safetensors")
    told = {"recipe": RECIPE, "latents": noise, "output_type": "latent"}
    drawn = pipe(STEERED[0], control_image=load_file(hosts.work / "picture.safetensors")["picture"], **told).images
    assert gap(hosts.comfys["steered by control"], drawn) < 1e-4
    assert gap(hosts.comfys["steered none"], drawn) > 1e-3


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
    if mode == "vsf":
        assert gap(hosts.comfys["steered by text made before"], drawn) < 1e-4


def test_a_bases_first_part_is_the_same_in_both_hosts(hosts: Hosts) -> None:
    both_hosts_drawn.check_diverse(hosts, PROMPTS[0], **NEGATIVE)
