"""Z-Image in both hosts, on the same tiny weights: texts, D and gradients are equal, and what one trains both load."""

from __future__ import annotations

from collections.abc import Callable

import both_hosts
import both_hosts_drawn
import pytest
import tiny_folders
import torch
from both_hosts import Hosts, gap
from both_hosts_drawn import ADAPTERS
from narrowed import narrowed

from onestep.core.recipe import Recipe

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]

PROMPTS = ["a red dragon", "a wall", "a red dragon"]
# Each text is filled up to 32 tokens or, of more words, to 64: the negative is as long as the prompt, longer, shorter.
SHORT, LONG = "a wall", "a red dragon in a storm by the sea"
STEERED = [("nag", SHORT, "red"), ("nasa", SHORT, LONG), ("vsf", LONG, "red"), ("perp", SHORT, LONG)]
FOUR = Recipe((1000.0, 900.0, 750.0, 500.0), family="z_image", shift=3.0, sizes=((32, 32),))


@pytest.fixture(scope="module")
def hosts(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    work = tmp_path_factory.mktemp("z_image")
    folder = tiny_folders.z_image_folder(work / "model")
    told = both_hosts_drawn.told(folder, FOUR, STEERED, SHORT)
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


@pytest.mark.parametrize("number", range(len(STEERED)), ids=[mode for mode, *_ in STEERED])
def test_a_negative_steers_both_hosts_alike(number: int, hosts: Hosts) -> None:
    both_hosts_drawn.check_steered(hosts, number, STEERED[number])


def test_the_base_draws_the_first_part_alike_in_both_hosts(hosts: Hosts) -> None:
    both_hosts_drawn.check_diverse(hosts, SHORT)


def test_variants_that_are_not_served_are_refused_by_name(hosts: Hosts) -> None:
    """Before the model is copied, with what is served instead."""
    found = hosts.report["refused"]
    for mark, name in {"siglip_embedder": "Z-Image Omni", "dec_net": "Z-Image in pixels"}.items():
        assert found[mark].startswith(f"{name} models cannot be adapted yet: use ") and "Z-Image" in found[mark][40:]


def test_a_head_sees_the_same_features(hosts: Hosts) -> None:
    """Of texts of two lengths: one call in diffusers, two in ComfyUI."""
    both_hosts_drawn.check_features(hosts)


@pytest.mark.parametrize("method", narrowed(both_hosts.RUNS, "dmd"))
def test_what_either_host_trains_both_load(method: str, hosts: Hosts) -> None:
    both_hosts.check_trained(hosts, method, PROMPTS, 37)


@pytest.mark.parametrize("method", ADAPTERS)
def test_either_host_trains_the_same_adapter(method: str, hosts: Hosts) -> None:
    """On texts of two lengths."""
    both_hosts_drawn.check_adapter(hosts, method, PROMPTS)


def test_the_guidance_of_either_host_draws_alike(hosts: Hosts) -> None:
    both_hosts_drawn.check_guidance(hosts)
