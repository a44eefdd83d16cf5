"""One adapter, two hosts: the same weights and adapters in ComfyUI's classes and in diffusers' give equal numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_networks as small
import torch
from narrowed import narrowed
from safetensors.torch import load_file, save_file
from torch import Tensor

from onestep.core.families import bind_diffusers, blocks_of
from onestep.core.families.table import natural
from onestep.core.features import Features
from onestep.core.lora_file import save_lora
from onestep.core.roles import Roles

pytestmark = pytest.mark.comfy

# Rotary positions are float32 in both hosts, and so are diffusers' RMS norms: float64 does not help there.
DTYPES = {
    **dict.fromkeys(("sd15", "sdxl", "sd3"), torch.float64),
    **dict.fromkeys(("sd35", "flux", "z_image", "flux2", "qwen_image", "anima", "krea2", "wan"), torch.float32),
    **dict.fromkeys(("chroma", "lumina2", "pixart"), torch.float32),
}
FEATURES = {
    "sd15": 9,
    "sdxl": 14,
    "sd3": 2,
    "sd35": 2,
    "flux": 2,
    "z_image": 2,
    "flux2": 2,
    "qwen_image": 2,
    "anima": 2,
    "krea2": 2,
    "wan": 2,
    "chroma": 6,
    "lumina2": 2,
    "pixart": 2,
}
"""Blocks that a discriminator may look at: all of an encoder and its middle, or of a transformer."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
LOOSER = {"z_image": 5e-5, "anima": 5e-5, "lumina2": 5e-5}
"""Z-Image's text is normed eight times on its way, each a float32 sum in another order; so are Anima's picture and
Lumina 2's text, whose queries and keys the hosts norm with other epsilons."""


CASES = narrowed(small.IN_COMFY, "sd15", "sd3", "flux", "z_image", "wan", "pixart")


@pytest.fixture(scope="module")
def hosts(
    run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """By case: (diffusers' tensors, ComfyUI's tensors, ComfyUI's report, tolerance), of the cases that are to be
    tested."""
    folder = tmp_path_factory.mktemp("hosts")
    tested: list[Any] = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params["name"] for item in tested}
    names = [name for name in small.IN_COMFY if name in asked]
    ours = {name: in_diffusers(name, folder) for name in names}
    run_inside("target_hosts", folder, *names)
    results = {}
    for name in names:
        report = json.loads((folder / f"{name}.report.json").read_text())
        tolerance = LOOSER.get(name, TOLERANCE[DTYPES[name]])
        results[name] = ours[name], load_file(folder / f"{name}.out.safetensors"), report, tolerance
    return results


def in_diffusers(name: str, folder: Path) -> dict[str, Tensor]:
    """Writes what ComfyUI shall use; returns what diffusers' network gives."""
    dtype, case = DTYPES[name], small.CASES[name]
    network: Any = small.network_of(name, dtype, **small.WHOLE.get(name, {}))
    inputs = small.inputs_of(name, dtype)
    inputs["g"] = small.seeded(4)(*inputs["x"].shape).to(dtype)
    if "sizes" in inputs:
        embedded = network.add_time_proj(inputs["sizes"].flatten()).reshape(len(inputs["x"]), -1)
        inputs["y"] = torch.cat([inputs["pooled"], embedded.to(dtype)], -1)
    targets = bind_diffusers(network)
    state = small.random_state(targets)
    save_file(network.state_dict(), folder / f"{name}.weights.safetensors")
    save_file(inputs, folder / f"{name}.inputs.safetensors")
    save_lora(folder / f"{name}.lora.safetensors", state, case.family, host="comfyui")
    told = {"family": case.family, "dtype": str(dtype).removeprefix("torch."), "unet_config": small.IN_COMFY[name]}
    told["features"] = FEATURES[name]
    (folder / f"{name}.json").write_text(json.dumps(told))
    plain = case.run(network, inputs)
    looked_at = Features({target.name: target for target in targets}, blocks_of(network), FEATURES[name])
    with torch.no_grad(), looked_at.kept(inputs["x"]) as found:
        case.run(network, inputs)
    features = {f"feature {name}": value for name, value in zip(looked_at.names, found, strict=True)}
    return {"plain": plain, **features, **adapted(case, network, targets, state, inputs)}


def adapted(case: small.Case, network: Any, targets: Any, state: Any, inputs: small.Inputs) -> dict[str, Tensor]:
    """The same as in inside/target_hosts.py: factors are leaves in the network's dtype, to see gradients in float64."""
    roles = Roles(targets)
    roles.load("student", state)
    leaves = {
        name: tuple(factor.detach().to(inputs["x"]).requires_grad_(True) for factor in factors)
        for name, factors in state.items()
    }
    roles._factors["student"] = leaves  # type: ignore[assignment]
    x = inputs["x"].clone().requires_grad_(True)
    roles.install()
    with roles.use("student"), roles.capture(len(x)):
        prediction = case.run(network, {**inputs, "x": x})
    roles.remove()
    (prediction * inputs["g"]).sum().backward()
    assert x.grad is not None
    out = {"adapted": prediction.detach(), "grad": x.grad}
    for name, factors in leaves.items():
        for letter, factor in zip("AB", factors, strict=True):
            out[f"{letter}|{name}"] = torch.zeros_like(factor) if factor.grad is None else factor.grad
    return out


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("name", CASES)
def test_both_hosts_bind_the_same_targets_in_the_same_order(name: str, hosts: dict[str, Any]) -> None:
    ours, _, report, _ = hosts[name]
    names = {key[2:] for key in ours if key.startswith("A|")}
    assert report["names"] == sorted(names, key=natural)


@pytest.mark.parametrize("name", CASES)
def test_the_table_is_comfyuis_own(name: str, hosts: dict[str, Any]) -> None:
    """Layer, rows and order of every target are what comfy.utils says of diffusers' keys; no other layer exists."""
    _, _, report, _ = hosts[name]
    table, theirs = report["table"], report["theirs"]
    for target, place in table.items():
        # ComfyUI gives SDXL's two names (class_embedding, add_embedding) and Flux' LyCORIS names to one layer.
        assert theirs[target] == place, target
    assert {place[0] for place in theirs.values()} == {place[0] for place in table.values()}
    assert report["unwritten"] == [] and report["without_reason"] == []


@pytest.mark.parametrize("name", CASES)
def test_rows_cover_each_fused_layer_without_overlap(name: str, hosts: dict[str, Any]) -> None:
    _, tensors, report, _ = hosts[name]
    ends: dict[str, int] = {}
    for target, (key, start, rows, _) in sorted(report["table"].items(), key=lambda item: (item[1][0], item[1][1])):
        assert start == ends.get(key, 0), target
        assert len(tensors[f"B|{target}"]) == rows
        ends[key] = start + rows
    weights = {place[0]: place for place in report["theirs"].values()}
    assert ends.keys() == weights.keys()


@pytest.mark.parametrize("name", CASES)
def test_prediction_and_every_gradient_agree(name: str, hosts: dict[str, Any]) -> None:
    ours, comfys, _, tolerance = hosts[name]
    assert gap(comfys["plain"], ours["plain"]) < tolerance
    assert gap(comfys["adapted"], ours["plain"]) > 0.05
    scale = max(float(value.norm()) for key, value in ours.items() if "|" in key)
    for key, value in ours.items():
        # A gradient of (nearly) nothing, such as the last block's unused queries, is measured against the largest.
        assert float((comfys[key] - value).norm()) < tolerance * max(float(value.norm()), 1e-3 * scale), key


@pytest.mark.parametrize("name", CASES)
def test_both_hosts_look_at_the_same_blocks(name: str, hosts: dict[str, Any]) -> None:
    """What a discriminator's head reads is, of each block, the same picture in both."""
    ours, comfys, _, tolerance = hosts[name]
    names = [key for key in ours if key.startswith("feature")]
    assert names == [key for key in ours if key in comfys and key.startswith("feature")]
    assert len(names) == FEATURES[name]
    for key in names:
        assert ours[key].ndim == 4 and float(ours[key].std()) > 0.01
        assert gap(comfys[key], ours[key]) < tolerance, key


@pytest.mark.parametrize("name", CASES)
def test_core_lora_loader_reads_every_key_and_gives_the_same_prediction(name: str, hosts: dict[str, Any]) -> None:
    ours, comfys, report, _ = hosts[name]
    assert report["complaints"] == []
    effect = (ours["adapted"] - ours["plain"]).norm()
    assert float((comfys["merged"] - ours["adapted"]).norm()) < 1e-5 * float(effect)
    assert torch.equal(comfys["after"], comfys["plain"])


@pytest.mark.parametrize("name", CASES)
def test_a_lora_in_comfyuis_own_fused_names_means_the_same_to_us(name: str, hosts: dict[str, Any]) -> None:
    """Fused layers come apart, swapped rows return, alpha is folded: our reading equals core's merge of that file."""
    _, comfys, _, _ = hosts[name]
    effect = (comfys["native_merged"] - comfys["plain"]).norm()
    assert float(effect) > 0.05 * float(comfys["plain"].norm())
    assert float((comfys["native"] - comfys["native_merged"]).norm()) < 1e-5 * float(effect)
