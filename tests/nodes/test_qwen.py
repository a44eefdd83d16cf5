"""Qwen-Image in both hosts, on the same tiny weights: texts under masks, latents, D and gradients are equal, and what
one trains both load, with either host's guidance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import both_hosts
import both_hosts_drawn as drawn
import pytest
import tiny_qwen
import torch
from both_hosts import Hosts, gap
from tiny_pipelines import video_vae

from onestep.core.recipe import Recipe
from onestep.core.schedule import FlowSchedule
from onestep.pipelines import adapt
from onestep.pipelines.load import load

pytestmark = [pytest.mark.broad, pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]

PROMPTS = ["a red dragon", "a wall", "a red dragon before a blue wall"]
LAYERS = 6 + 2 * 14
"""The ends, and two blocks."""
ENDS = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
SILENT = [f"transformer_blocks.1.{name}" for name in ENDS]
"""What the last block makes of the text goes nowhere."""
GUIDED = {"regression": {"token_norm": "off"}, "dmd": {"token_norm": "on"}}
ON = {"token_norm": "on"}
"""Either host's guidance in both; a base's first part is drawn without."""
SIZE = (32, 32)
SHIFTED = FlowSchedule(math.exp(1.15))
ONE = Recipe.at(SHIFTED, torch.tensor([900.0], dtype=torch.float64), family="qwen_image", sizes=(SIZE,))
NEGATIVES = [("nag", "a wall", "a red dragon"), ("vsf", "a wall", "red"), ("perp", "a red dragon", "blue")]


@pytest.fixture(scope="module")
def hosts(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    static: dict[str, Any] = {"use_dynamic_shifting": False, "shift": math.exp(1.15), "shift_terminal": None}
    folder = tiny_qwen.qwen_image_folder(tmp_path_factory.mktemp("qwen") / "model", video_vae(), **static)
    recipe = Recipe.for_student(SHIFTED, 2, "qwen_image", (SIZE,))
    told = drawn.told(folder, recipe, NEGATIVES, PROMPTS[0], 1.0)
    told["runs"] = {method: {**told["runs"][method], **GUIDED.get(method, ON)} for method in told["runs"]}
    drawn.control_file(adapt(load(folder)), folder.parent, SIZE)
    return both_hosts.both(run_inside, folder, PROMPTS, "qwen", recipe=ONE.to_json(), **told)


def test_prompts_become_the_same_conditions_of_several_lengths(hosts: Hosts) -> None:
    assert hosts.report["family"] == "qwen_image" and hosts.report["blocks"] == 2
    assert hosts.inputs["text"].shape[2] == 128 and len(set(hosts.inputs["mask"].sum(1).tolist())) == 3
    assert torch.equal(hosts.comfys["mask"], hosts.inputs["mask"])
    assert gap(hosts.comfys["text"], hosts.inputs["text"]) < 1e-5


@torch.no_grad()
def test_a_batch_of_several_lengths_is_each_row_alone(hosts: Hosts) -> None:
    assert gap(hosts.comfys["together"], hosts.comfys["alone"]) < 1e-6
    ours = hosts.host.denoiser(hosts.inputs["x"], hosts.inputs["sigma"], hosts.cond)
    assert gap(hosts.comfys["together"], ours) < 1e-5


@torch.no_grad()
def test_pictures_become_the_same_latents_and_come_back(hosts: Hosts) -> None:
    host, pictures = hosts.host, hosts.comfys["pictures"]
    latents = host.latents_of(pictures)
    assert latents.shape == (2, 16, 8, 12)
    assert gap(hosts.comfys["latents"], latents) < 1e-5
    assert gap(hosts.comfys["decoded"], host.decode(latents)) < 1e-5


def test_a_static_shift_is_one_in_both_and_guidance_is_each_hosts_own(hosts: Hosts) -> None:
    denoise = hosts.host.denoiser
    assert hosts.report["shift"] == pytest.approx(denoise.schedule.shift) == pytest.approx(math.exp(1.15))
    assert (denoise.token_norm, hosts.report["token_norm"]) == (2, 0)


def test_odd_numbers_of_patches_are_refused(hosts: Hosts) -> None:
    assert "multiples of 32 pixels" in hosts.report["refused"] and "take 1344x1344" in hosts.report["refused"]


def test_an_editing_model_is_refused_by_its_files_name(hosts: Hosts) -> None:
    assert hosts.report["edit"].startswith("qwen_image_edit_2509_fp8 is Qwen-Image-Edit, which is not served: use ")


def test_d_and_every_gradient_are_diffusers(hosts: Hosts) -> None:
    both_hosts.check_gradients(hosts, 5e-5, SILENT)


def test_rows_of_several_roles_are_those_of_each_alone(hosts: Hosts) -> None:
    both_hosts.check_rows(hosts)


@pytest.mark.parametrize("method", GUIDED)
def test_what_either_host_trains_both_load(method: str, hosts: Hosts) -> None:
    both_hosts.check_trained(hosts, method, PROMPTS, LAYERS, **GUIDED[method])


@pytest.mark.parametrize("number", range(len(NEGATIVES)), ids=[mode for mode, *_ in NEGATIVES])
def test_a_negative_is_steered_away_from_alike(number: int, hosts: Hosts) -> None:
    drawn.check_steered(hosts, number, NEGATIVES[number])


def test_a_bases_first_part_is_alike(hosts: Hosts) -> None:
    drawn.check_diverse(hosts, PROMPTS[0], guidance=1.0)


@pytest.mark.parametrize("method", drawn.ADAPTERS)
def test_both_hosts_train_the_same_adapter(method: str, hosts: Hosts) -> None:
    drawn.check_adapter(hosts, method, PROMPTS, **ON)


def test_both_hosts_draw_by_a_guidance_adapter(hosts: Hosts) -> None:
    drawn.check_guidance(hosts)


def test_a_control_is_the_same_in_both_hosts(hosts: Hosts) -> None:
    drawn.check_control(hosts, PROMPTS[0], ONE, SIZE)
