"""ComfyUI's models behind the contract: derivatives, equality with diffusers, what is refused, what is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from narrowed import narrowed
from safetensors.torch import load_file, save_file

from onestep.core.cond import Cond
from onestep.core.lora_file import save_lora
from onestep.pipelines.adapt import adapt

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore::FutureWarning")]
ABSENT = {"tiny-flow": {"text_encoder_3": None, "tokenizer_3": None}}


@pytest.mark.parametrize("name", narrowed(["sd15", "sd3", "flux"], "sd3"))
def test_derivatives_are_those_of_finite_differences(
    name: str, checkpoints: Path, run_inside: Callable[..., str]
) -> None:
    """In float64; computed again or not, the gradients are the same to the bit. Flux adds to its streams in place,
    which neither may notice."""
    told = json.loads(run_inside("derivatives", checkpoints / f"tiny_{name}.safetensors").strip().splitlines()[-1])
    assert told["family"] == {"sd15": "unet"}.get(name, name)
    assert max(told["plain"] + told["checkpointed"] + told["gated"]) < 1e-5, told
    assert (told["gates"] > 0) == (name == "sd15") and told["gated_apart"] < 1e-10, told
    assert told["apart"] == {"feed-forwards": [], "blocks": []} and told["blocks"] >= 2, told
    kinds = {"sd15": {"FeedForward"}, "sd3": {"Mlp"}, "flux": {"Sequential", "SingleStreamBlock"}}[name]
    assert set(told["feed_forwards"]) == kinds
    # The last joint block of SD3 drops its text stream, so what the text asks there reaches nothing.
    assert told["missing"] == (["transformer_blocks.1.attn.add_q_proj"] if name == "sd3" else [])


def exact_norms(network: torch.nn.Module) -> None:
    """diffusers' RMSNorm takes its mean square in float32, torch's in the input's dtype."""
    for parent in list(network.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__ == "RMSNorm":
                exact = torch.nn.RMSNorm(norm.weight.shape, norm.eps, dtype=torch.float64)
                exact.weight = norm.weight
                setattr(parent, name, exact)


@pytest.fixture(scope="module", params=["tiny", "tiny-flow", "tiny-v"])
def hosts(request: Any, random_tiny: dict[str, Path], run_inside: Callable[..., str], tmp_path_factory: Any) -> Any:
    """(diffusers' host, the inputs, what ComfyUI's host made of them), in float64, adapters far from B = 0."""
    folder, place = random_tiny[request.param], tmp_path_factory.mktemp("hosts")
    host = adapt(DiffusionPipeline.from_pretrained(folder, **ABSENT.get(request.param, {})))
    exact_norms(host.network.double())
    draw = torch.Generator().manual_seed(0)
    cond = host.encode(["a red dragon", "wall"], (32, 32))
    host.denoiser.roles.add("student", 3, 7)
    inputs = {
        "text": cond.text,
        "x": torch.randn(2, 4, 8, 8, generator=draw),
        "weight": torch.randn(2, 4, 8, 8, generator=draw),
    }
    inputs |= {} if cond.pooled is None else {"pooled": cond.pooled}
    for name, (a, b) in host.denoiser.roles.state("student").items():
        b.copy_(torch.randn(b.shape, generator=draw) * 0.3)
        inputs |= {f"A/{name}": a, f"B/{name}": b}
    told = torch.tensor([999.0, 400.0], dtype=torch.float64)
    inputs = {name: value.double().contiguous() for name, value in inputs.items()}
    inputs |= {"sigma": host.denoiser.schedule.sigma_of_time(told), "told": told}
    save_file(inputs, place / "in.safetensors")
    run_inside("host_forward", folder, place / "in.safetensors", place / "out.safetensors")
    return host, inputs, load_file(place / "out.safetensors")


def test_both_hosts_have_the_same_targets_and_schedule(hosts: Any) -> None:
    host, inputs, comfy = hosts
    names = {name.removeprefix("A/") for name in comfy if name.startswith("A/")}
    assert names == set(host.denoiser.roles.targets)
    # ComfyUI keeps its table in float32
    assert torch.allclose(comfy["sigma"], inputs["sigma"], rtol=2e-6)
    assert torch.equal(comfy["trailing"], host.denoiser.schedule.trailing(4))
    assert torch.equal(comfy["time"], host.denoiser.schedule.time_of_sigma(inputs["sigma"]))


def test_prompts_become_the_same_conditions(hosts: Any) -> None:
    _, inputs, comfy = hosts
    for name in ("text", "pooled"):
        assert (name in inputs) == (name in comfy)
        assert name not in inputs or float((inputs[name] - comfy[name]).abs().max()) < 1e-5


def test_the_denoiser_and_every_gradient_are_diffusers(hosts: Any) -> None:
    host, inputs, comfy = hosts
    roles = host.denoiser.roles
    roles.load(
        "student", {name[2:]: (inputs[name], inputs["B/" + name[2:]]) for name in inputs if name.startswith("A/")}
    )
    for factor in roles.parameters("student"):
        factor.data = factor.data.double()
    with roles.use("student"):
        x0 = host.denoiser(inputs["x"], inputs["sigma"], Cond(inputs["text"], pooled=inputs.get("pooled")))
    gradients = torch.autograd.grad((inputs["weight"] * x0).sum(), roles.parameters("student"))
    x0 = x0.detach()
    assert float(x0.std()) > 0.1
    assert float((x0 - comfy["x0"]).abs().max()) < 1e-10 * float(x0.abs().max())
    scale = max(float(gradient.abs().max()) for gradient in gradients)
    theirs = [comfy[f"{kind}/{name}"] for name in sorted(roles.targets) for kind in "AB"]
    assert max(float((g - t).abs().max()) for g, t in zip(gradients, theirs, strict=True)) < 1e-10 * scale


@pytest.fixture(scope="module", params=narrowed(["tiny", "tiny-flow"], "tiny"))
def two_runs(request: Any, random_tiny: dict[str, Path], run_inside: Callable[..., str], tmp_path_factory: Any) -> Any:
    """What a process says that made two whole runs."""
    work = tmp_path_factory.mktemp("runs")
    return json.loads(run_inside("runs", random_tiny[request.param], work).strip().splitlines()[-1])


@pytest.mark.broad
def test_two_runs_leave_what_one_leaves_and_the_plugged_model_as_it_was(two_runs: Any) -> None:
    told = two_runs
    assert told["unchanged"], "the plugged MODEL draws the same picture before and after"
    assert told["one"] == told["two"], "memory after two runs is memory after one"
    assert told["one"] - told["start"] < 0.01 * told["base"], "a run leaves nothing of the model's size"
    assert told["equal_runs"] and not told["in_training"]


def test_each_base_tensor_is_there_once_beside_comfyuis_own(two_runs: Any) -> None:
    """While training: ComfyUI's copy, ours, the adapters, their moments and gradients; nothing of the base's size."""
    told = two_runs
    for live in told["live"]:
        assert live["same"] and live["roles"] == 3
        # start holds ComfyUI's copy; two roles learn, each with a gradient's and two moments' worth
        bound = told["start"] + told["base"] + 4 * live["adapters"] + 0.1 * told["base"]
        assert live["total"] < bound, (live, told)


@pytest.mark.parametrize("name", narrowed(["tiny", "tiny-flow"], "tiny"))
def test_a_lora_stack_and_a_sampling_patch_are_part_of_the_teacher(
    name: str, random_tiny: dict[str, Path], run_inside: Callable[..., str], tmp_path: Path
) -> None:
    network = adapt(DiffusionPipeline.from_pretrained(random_tiny[name], **ABSENT.get(name, {})))
    roles, draw = network.denoiser.roles, torch.Generator().manual_seed(5)
    roles.add("style", 2, 1)
    for _, b in roles.state("style").values():
        b.copy_(torch.randn(b.shape, generator=draw) * 0.2)
    save_lora(tmp_path / "style.safetensors", roles.state("style"), network.family)
    told = json.loads(run_inside("baked", random_tiny[name], tmp_path / "style.safetensors").strip().splitlines()[-1])
    assert told["effect"] > 0.05 and told["apart"] < 1e-4 and told["unchanged"], told
