"""FLUX.2 klein in both hosts, on the same tiny weights: texts, latents, steps, D and gradients are equal, and what one
trains both load."""

from __future__ import annotations

from collections.abc import Callable

import both_hosts
import both_hosts_drawn
import pytest
import tiny_folders
import torch
from both_hosts import Hosts, gap
from both_hosts_drawn import ADAPTERS
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from narrowed import narrowed

from onestep.core.families import FAMILIES
from onestep.core.recipe import Recipe

pytestmark = [pytest.mark.broad, pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]

PROMPTS = ["a red dragon", "a wall", "a red dragon"]
SHIFT = FAMILIES["flux2"].schedule.shift
STEERED = [("nag", "a wall", "red"), ("nasa", "a red dragon", "a wall"), ("vsf", "a wall", "red"), ("perp", "red", "a")]
FOUR = Recipe((1000.0, 900.0, 750.0, 500.0), family="flux2", shift=SHIFT, sizes=((32, 32),))
LAYERS = 4 + 2 * 12 + 2 * 2
"""The ends, two double and two single blocks."""


@pytest.fixture(scope="module")
def hosts(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    folder = tiny_folders.klein_folder(tmp_path_factory.mktemp("klein") / "model")
    return both_hosts.both(run_inside, folder, PROMPTS, **both_hosts_drawn.told(folder, FOUR, STEERED, "a wall"))


def test_prompts_become_the_same_conditions_of_512_tokens(hosts: Hosts) -> None:
    assert hosts.report["family"] == "flux2" and hosts.report["blocks"] == 4 and "mask" not in hosts.comfys
    assert hosts.inputs["text"].shape == (3, 512, 48)
    assert gap(hosts.comfys["text"], hosts.inputs["text"]) < 1e-5


def test_shorter_texts_are_filled_in_front_as_the_model_itself_fills_them(hosts: Hosts) -> None:
    """dev's are as long as they are: a batch of several lengths is each row alone."""
    text = hosts.comfys["filled/text"]
    assert text.shape == (2, 512, 48) and not text[0, :509].any() and not text[1, :507].any()
    assert gap(hosts.comfys["filled"], hosts.comfys["filled/alone"]) < 1e-5


def test_both_hosts_have_one_schedule(hosts: Hosts) -> None:
    assert hosts.report["schedule"] == repr(hosts.host.denoiser.schedule)


@torch.no_grad()
def test_pictures_become_the_same_latents_and_come_back(hosts: Hosts) -> None:
    """16 channels, an eighth of the side: folded and normed by the autoencoder's statistics in both."""
    host, pictures = hosts.host, hosts.comfys["pictures"]
    latents = host.latents_of(pictures)
    assert latents.shape == (2, 16, 4, 6)
    assert gap(hosts.comfys["latents"], latents) < 1e-5
    assert gap(hosts.comfys["decoded"], host.decode(latents)) < 1e-5
    assert float((latents.mean((0, 2, 3)) - latents.mean()).abs().max()) > 0.1


def test_d_and_every_gradient_are_diffusers(hosts: Hosts) -> None:
    both_hosts.check_gradients(hosts, 5e-5)


def test_rows_of_several_roles_are_those_of_each_alone(hosts: Hosts) -> None:
    both_hosts.check_rows(hosts)


@pytest.mark.parametrize("method", narrowed(both_hosts.RUNS, "dmd"))
def test_what_either_host_trains_both_load(method: str, hosts: Hosts) -> None:
    both_hosts.check_trained(hosts, method, PROMPTS, LAYERS)


@pytest.mark.parametrize("number", range(len(STEERED)), ids=[mode for mode, *_ in STEERED])
def test_a_negative_steers_both_hosts_alike(number: int, hosts: Hosts) -> None:
    both_hosts_drawn.check_steered(hosts, number, STEERED[number])


def test_the_base_draws_the_first_part_alike_in_both_hosts(hosts: Hosts) -> None:
    """By the scheduler "simple", which moves its steps alike, however many they are."""
    base = DiffusionPipeline.from_pretrained(hosts.work / "model")
    base.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    both_hosts_drawn.check_diverse(hosts, "a wall", base)


@pytest.mark.parametrize("method", ADAPTERS)
def test_either_host_trains_the_same_adapter(method: str, hosts: Hosts) -> None:
    both_hosts_drawn.check_adapter(hosts, method, PROMPTS)


def test_the_guidance_of_either_host_draws_alike(hosts: Hosts) -> None:
    both_hosts_drawn.check_guidance(hosts)
