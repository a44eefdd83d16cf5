"""Lumina 2 in both hosts, on the same tiny weights: texts, D and gradients are equal, and what one trains both load,
each its own file of two."""

from __future__ import annotations

from collections.abc import Callable

import both_hosts
import both_hosts_drawn
import pytest
import tiny_folders
import tiny_lumina2
import torch
from both_hosts import Hosts, gap
from both_hosts_drawn import ADAPTERS

from onestep.core.lora_file import load_lora
from onestep.core.recipe import Recipe
from onestep.core.schedule import FlowSchedule
from onestep.pipelines import adapt
from onestep.pipelines.load import load

pytestmark = [pytest.mark.comfy, pytest.mark.broad, pytest.mark.filterwarnings("ignore")]

PROMPTS = ["a red dragon", "a wall", "a red dragon"]
# With a system prompt of their own, which core's nodes put before none.
SHORT, LONG = "Draw. <Prompt Start> a wall", "Draw. <Prompt Start> a red dragon by the sea"
STEERED = [("nag", SHORT, "red"), ("nasa", SHORT, "a red dragon in a storm by the sea"), ("vsf", LONG, "red")]
STEERED += [("perp", SHORT, "a red dragon in a storm by the sea")]
FOUR = Recipe((1000.0, 947.3684210526316, 857.1428571428571, 666.6666666666666), family="lumina2", shift=6.0)
SIZE = (32, 32)
TIME = torch.tensor([900.0], dtype=torch.float64)
ONE = Recipe.at(FlowSchedule(6.0), TIME, family="lumina2", sizes=(SIZE,))
GUIDED = {"regression": {"token_norm": "off"}, "dmd": {"token_norm": "on"}}
ON = {"token_norm": "on"}
"""Either host's guidance in both; a base's first part is drawn without."""
LAYERS = 37


@pytest.fixture(scope="module")
def hosts(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    work = tmp_path_factory.mktemp("lumina2")
    vae = tiny_folders.shaken(tiny_folders.autoencoder(0.8, 0.1, plain=True), 2)
    folder = tiny_lumina2.lumina2_folder(work / "model", vae)
    told = both_hosts_drawn.told(folder, FOUR, STEERED, SHORT, 1.0)
    told["runs"] = {method: {**told["runs"][method], **GUIDED.get(method, ON)} for method in told["runs"]}
    both_hosts_drawn.control_file(adapt(load(folder)), work, SIZE)
    return both_hosts.both(run_inside, folder, PROMPTS, "lumina2", recipe=ONE.to_json(), **told)


def test_prompts_become_the_same_conditions_behind_the_system_prompt(hosts: Hosts) -> None:
    inputs, comfys, report = hosts.inputs, hosts.comfys, hosts.report
    assert report["family"] == "lumina2" and report["shift"] == 6.0 and report["blocks"] == 4
    assert torch.equal(comfys["mask"], inputs["mask"]) and len(set(inputs["mask"].sum(1).tolist())) == 2
    assert gap(comfys["text"], inputs["text"]) < 1e-5


@torch.no_grad()
def test_a_system_prompt_of_ones_own_and_a_negative_are_read_alike(hosts: Hosts) -> None:
    """The usual one is what CLIPTextEncodeLumina2 says; a negative has none, as in Lumina2Pipeline."""
    host, comfys, prompt = hosts.host, hosts.comfys, PROMPTS[0]
    assert torch.equal(comfys["text/usual"], comfys["text/node"])
    _, _, *negative = host.pipe.encode_prompt([prompt], negative_prompt=[prompt])
    own, *_ = host.pipe.encode_prompt([prompt], False, system_prompt="Draw well.")
    wanted = {"negative": negative[0][:, negative[1][0].bool()], "own": own[:, : comfys["text/own"].shape[1]]}
    for name, text in wanted.items():
        assert gap(comfys[f"text/{name}"], text) < 1e-5, name
    mine = host.texts([f"Draw well. <Prompt Start> {prompt}"]), host.texts([prompt], negative=True)
    assert all(
        torch.equal(found.text, text) for found, text in zip(mine, (wanted["own"], wanted["negative"]), strict=True)
    )


def test_d_and_every_gradient_are_diffusers_for_texts_of_two_lengths(hosts: Hosts) -> None:
    """One call in diffusers, two in ComfyUI."""
    both_hosts.check_gradients(hosts, 5e-5)


def test_rows_of_several_roles_are_those_of_each_alone(hosts: Hosts) -> None:
    both_hosts.check_rows(hosts)


@pytest.mark.parametrize("number", range(len(STEERED)), ids=[mode for mode, *_ in STEERED])
def test_a_negative_steers_both_hosts_alike(number: int, hosts: Hosts) -> None:
    both_hosts_drawn.check_steered(hosts, number, STEERED[number])


def test_the_base_draws_the_first_part_alike_in_both_hosts(hosts: Hosts) -> None:
    both_hosts_drawn.check_diverse(hosts, SHORT, None, 1.0)


def test_a_head_sees_the_same_features(hosts: Hosts) -> None:
    both_hosts_drawn.check_features(hosts)


def test_what_is_not_served_is_refused_by_name(hosts: Hosts) -> None:
    """Before the model is copied: NewBie, and core's renormed guidance, which is neither host's own."""
    assert hosts.host.denoiser.token_norm == "row" and hosts.report["token_norm"] == 0
    assert hosts.report["newbie"].startswith("NewBie models cannot be adapted yet: use ")
    assert "carries the option sampler_cfg_function" in hosts.report["renorm"]


@pytest.mark.parametrize("method", both_hosts.RUNS)
def test_what_either_host_trains_both_load(method: str, hosts: Hosts) -> None:
    both_hosts.check_trained(hosts, method, PROMPTS, LAYERS, **GUIDED[method])


def test_a_run_leaves_two_files_and_says_which_is_whose(hosts: Hosts) -> None:
    name, said = hosts.report["files"]["regression"]
    folder = hosts.work / "comfy-regression"
    found = sorted(path.name for path in folder.glob("result*.safetensors"))
    assert found == ["result.safetensors", "result_diffusers.safetensors"] and name == found[0]
    assert f"result_diffusers.safetensors is the same {LAYERS} layers for diffusers, which is not here" in said
    ours, theirs = (load_lora(folder / file) for file in found)
    assert ours.recipe == theirs.recipe and ours.metadata["ss_seed"] == theirs.metadata["ss_seed"]


@pytest.mark.parametrize("method", ADAPTERS)
def test_either_host_trains_the_same_adapter(method: str, hosts: Hosts) -> None:
    both_hosts_drawn.check_adapter(hosts, method, PROMPTS, **ON)


def test_the_guidance_of_either_host_draws_alike(hosts: Hosts) -> None:
    both_hosts_drawn.check_guidance(hosts)


def test_a_control_is_the_same_in_both_hosts(hosts: Hosts) -> None:
    both_hosts_drawn.check_control(hosts, SHORT, ONE, SIZE)
