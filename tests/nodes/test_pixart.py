"""PixArt-Sigma in both hosts, on the same tiny weights: texts of several lengths, D and gradients are equal, a
negative steers both alike, and what one trains both read; what is not served is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import both_hosts
import both_hosts_drawn
import pytest
import tiny_pixart
import torch
from both_hosts import RUNS, Hosts, gap

from onestep.core.families import FAMILIES
from onestep.core.recipe import Recipe
from onestep.pipelines import adapt
from onestep.pipelines.load import load

pytestmark = [pytest.mark.comfy, pytest.mark.broad, pytest.mark.filterwarnings("ignore")]

PROMPTS = ["a red dragon", "a wall", "a red dragon before a blue wall"]
STEERED = [("nag", "a wall", "red"), ("nasa", "a wall", "a red dragon in a storm by the sea")]
STEERED += [("vsf", "a red dragon by the sea", "red"), ("perp", "a wall", "a red dragon in a storm by the sea")]
SHARE = 300 / 999
"""Of the schedule, at a whole time, as ComfyUI tells its network."""
LAYERS = 7 + 2 * 10
SIZE = (40, 40)
ALIKE = {"sizes": "40x40", "ema": 0.0}
"""Without a running mean: it and the student are equally near the teacher here, and rounding would choose."""
NCT = both_hosts_drawn.ADAPTERS["nct"]
TIME = torch.tensor([900.0], dtype=torch.float64)
RECIPE = Recipe.at(FAMILIES["pixart"].schedule, TIME, family="pixart", sizes=(SIZE,))


@pytest.fixture(scope="module")
def hosts(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    folder = tiny_pixart.pixart_folder(tmp_path_factory.mktemp("pixart") / "model")
    both_hosts_drawn.control_file(adapt(load(folder)), folder.parent, SIZE)
    runs = {method: {**told, **ALIKE} for method, told in {**RUNS, "nct": NCT}.items()}
    told = {"runs": runs, "recipe": RECIPE.to_json(), "steered": STEERED, "share": SHARE}
    return both_hosts.both(run_inside, folder, PROMPTS, "pixart", size=SIZE, **told)


def test_prompts_become_the_same_conditions_of_their_own_lengths(hosts: Hosts) -> None:
    assert hosts.report["family"] == "pixart" and hosts.report["blocks"] == 2
    assert torch.equal(hosts.comfys["mask"], hosts.inputs["mask"])
    assert gap(hosts.comfys["text"], hosts.inputs["text"]) < 1e-5


@torch.no_grad()
def test_a_batch_of_several_lengths_is_each_row_alone(hosts: Hosts) -> None:
    assert gap(hosts.comfys["together"], hosts.comfys["alone"]) < 1e-6
    ours = hosts.host.denoiser(hosts.inputs["x"], hosts.inputs["sigma"], hosts.cond)
    assert gap(hosts.comfys["together"], ours) < 1e-5


def test_d_and_every_gradient_are_diffusers(hosts: Hosts) -> None:
    both_hosts.check_gradients(hosts, 5e-5)


def test_a_head_sees_the_same_features(hosts: Hosts) -> None:
    both_hosts_drawn.check_features(hosts)


def test_rows_of_several_roles_are_those_of_each_alone(hosts: Hosts) -> None:
    both_hosts.check_rows(hosts)


@pytest.mark.parametrize("number", range(len(STEERED)), ids=[mode for mode, *_ in STEERED])
def test_a_negative_steers_both_hosts_alike(number: int, hosts: Hosts) -> None:
    both_hosts_drawn.check_steered(hosts, number, STEERED[number], SHARE)


@pytest.mark.parametrize("method", RUNS)
def test_what_either_host_trains_both_load(method: str, hosts: Hosts) -> None:
    both_hosts.check_trained(hosts, method, PROMPTS, LAYERS, **ALIKE)


def test_a_control_is_the_same_in_both_hosts(hosts: Hosts) -> None:
    both_hosts_drawn.check_control(hosts, PROMPTS[0], RECIPE, SIZE)


def test_both_hosts_train_one_control(hosts: Hosts) -> None:
    both_hosts_drawn.check_adapter(hosts, "nct", PROMPTS, **ALIKE)


def test_captions_are_never_dropped_and_what_is_not_served_is_refused(hosts: Hosts) -> None:
    assert hosts.report["training"] is False
    assert "draws from 33 pixels on" in hosts.report["small"]
