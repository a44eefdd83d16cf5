"""Anima in both hosts, on the same tiny weights: texts, latents, D and gradients are equal, and what one trains both
load; in ComfyUI D and its text are those of core's own ops."""

from __future__ import annotations

from collections.abc import Callable

import both_hosts
import pytest
import tiny_folders
import torch
from both_hosts import Hosts, gap

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]

PROMPTS = ["a red dragon", "a wall", "a red dragon on a long wall of stone"]
LAYERS = 6 + 2 * 16
NEGATIVE = {"negative": "a dull wall"}
"""Of an empty text diffusers makes zeros, and ComfyUI what its encoder makes of a padding token."""


@pytest.fixture(scope="module")
def hosts(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    folder = tiny_folders.anima_folder(tmp_path_factory.mktemp("anima") / "model")
    runs = {method: {**told, **NEGATIVE} for method, told in both_hosts.RUNS.items()}
    return both_hosts.both(run_inside, folder, PROMPTS, "anima", runs=runs)


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
