"""Krea 2 in both hosts, on the same tiny weights: texts of several layers and lengths, latents, D and gradients are
equal, and what one trains both load."""

from __future__ import annotations

import math
from collections.abc import Callable

import both_hosts
import both_hosts_drawn as drawn
import pytest
import tiny_krea2
import torch
from both_hosts import RUNS, Hosts, gap
from tiny_pipelines import video_vae

from onestep.core.recipe import Recipe
from onestep.core.schedule import FlowSchedule
from onestep.pipelines import adapt
from onestep.pipelines.load import load

pytestmark = [pytest.mark.broad, pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]

PROMPTS = ["a red dragon", "a wall", "a red dragon before a blue wall"]
LAYERS = 8 + 8 * (2 + 4)
"""The ends, two blocks, and four that fuse a text."""
SIZE = (32, 32)
TURBO = FlowSchedule(math.exp(1.15))
ONE = Recipe.at(TURBO, torch.tensor([900.0], dtype=torch.float64), family="krea2", sizes=(SIZE,))
NEGATIVES = [
    *(("nag", "a wall", "a red dragon"), ("nasa", "a red dragon", "a wall")),
    *(("vsf", "a wall", "red"), ("perp", "a red dragon", "blue")),
]


@pytest.fixture(scope="module")
def hosts(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    """Turbo's, whose shift is that of ComfyUI."""
    folder = tiny_krea2.krea2_folder(tmp_path_factory.mktemp("krea2") / "model", video_vae(), distilled=True)
    drawn.control_file(adapt(load(folder)), folder.parent, SIZE)
    told = drawn.told(folder, Recipe.for_student(TURBO, 2, "krea2", (SIZE,)), NEGATIVES, PROMPTS[0])
    return both_hosts.both(run_inside, folder, PROMPTS, "krea2", recipe=ONE.to_json(), **told)


def test_prompts_become_the_same_conditions_of_several_lengths(hosts: Hosts) -> None:
    """The order of a text's tokens is diffusers' own, whose suffix stands behind the padding."""
    assert hosts.report["family"] == "krea2" and hosts.report["blocks"] == 6
    assert hosts.inputs["text"].shape[2] == 24 and len(set(hosts.inputs["mask"].sum(1).tolist())) == 3
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


def test_turbos_shift_is_one_in_both(hosts: Hosts) -> None:
    assert hosts.report["schedule"] == repr(hosts.host.denoiser.schedule)
    assert hosts.report["shift"] == pytest.approx(math.exp(1.15))


def test_d_and_every_gradient_are_diffusers(hosts: Hosts) -> None:
    both_hosts.check_gradients(hosts, 5e-5)


def test_rows_of_several_roles_are_those_of_each_alone(hosts: Hosts) -> None:
    both_hosts.check_rows(hosts)


@pytest.mark.parametrize("method", RUNS)
def test_what_either_host_trains_both_load(method: str, hosts: Hosts) -> None:
    both_hosts.check_trained(hosts, method, PROMPTS, LAYERS)


@pytest.mark.parametrize("number", range(len(NEGATIVES)), ids=[mode for mode, *_ in NEGATIVES])
def test_a_negative_is_steered_away_from_alike(number: int, hosts: Hosts) -> None:
    drawn.check_steered(hosts, number, NEGATIVES[number])


def test_a_bases_first_part_is_alike(hosts: Hosts) -> None:
    drawn.check_diverse(hosts, PROMPTS[0])


@pytest.mark.parametrize("method", drawn.ADAPTERS)
def test_both_hosts_train_the_same_adapter(method: str, hosts: Hosts) -> None:
    drawn.check_adapter(hosts, method, PROMPTS)


def test_both_hosts_draw_by_a_guidance_adapter(hosts: Hosts) -> None:
    drawn.check_guidance(hosts)


def test_a_control_is_the_same_in_both_hosts(hosts: Hosts) -> None:
    drawn.check_control(hosts, PROMPTS[0], ONE, SIZE)
