"""A control adapter in ComfyUI, through core's own Apply ControlNet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def told(random_tiny: dict[str, Path], run_inside: Callable[..., str], tmp_path_factory: Any) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("controlnet")
    said = run_inside("control", random_tiny["tiny"], random_tiny["tiny-flow"], work)
    return json.loads(said.strip().splitlines()[-1])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def joint(run_inside: Callable[..., str], tmp_path_factory: Any) -> dict[str, Any]:
    said = run_inside("control_joint", tmp_path_factory.mktemp("controlnet"))
    return json.loads(said.strip().splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["sd3", "flux", "flux2", "z_image"])
def test_joint_models_take_it_before_their_first_block(joint: dict[str, Any], kind: str) -> None:
    """Against the same adapter on the layer that embeds the picture, which is where it was trained; with CFG too."""
    found = joint[kind]
    assert max(found["side"], found["side, CFG"], found["two"]) < 1e-5 and found["effect"] > 0.02, found
    assert found["new"] and found["after"] and found["early"] == 0 and found["late"] > 0.02


@pytest.mark.parametrize("kind", ["sd3", "flux", "flux2"])
def test_joint_models_keep_what_else_replaces_their_first_block(joint: dict[str, Any], kind: str) -> None:
    assert joint[kind]["replaced"] < 1e-5 and joint[kind]["replacement"] > 0.02


@pytest.mark.parametrize("kind", ["sd3", "flux", "flux2", "z_image"])
def test_odd_latents_are_filled_up_as_the_network_fills_them(joint: dict[str, Any], kind: str) -> None:
    assert joint[kind]["odd"] < 1e-5


def test_reference_pictures_stay_uncontrolled(joint: dict[str, Any]) -> None:
    assert joint["reference"] < 1e-5


@pytest.mark.parametrize("steps", [1, 2])
def test_as_a_control_net_it_is_what_it_is_as_a_side(told: dict[str, Any], steps: int) -> None:
    """One step without guidance, two with: the residual lists say the same as hooks on the layers, in float32."""
    assert told[f"side {steps}"] < 2e-5 * told[f"effect {steps}"] and told[f"effect {steps}"] > 1, told


@pytest.mark.parametrize("steps", [1, 2])
def test_a_new_adapter_is_bit_identical_to_none_and_nothing_is_left_behind(told: dict[str, Any], steps: int) -> None:
    assert told[f"new {steps}"] and told[f"after {steps}"]


def test_it_obeys_its_range_and_adds_to_other_controls(told: dict[str, Any]) -> None:
    assert min(told["range"]) > 1 and told["two"] < 2e-5 * told["effect 2"]


def test_a_mask_comes_from_cores_node_for_it(told: dict[str, Any]) -> None:
    error, effect = told["mask"]
    assert error < 2e-5 * effect and effect > 1


def test_an_image_of_another_size_is_resized_with_a_word(told: dict[str, Any]) -> None:
    assert told["resized"] and told["log"] == ["OneStep: the control image is resized from 64x64 to 32x32"]


def test_what_is_refused(told: dict[str, Any]) -> None:
    assert "made for 'unet' models, this one is 'sd3'" in told["flow"]
    assert "64 channels to conv_in, this model lacks it" in told["sd3"]
    assert "models/controlnet" in told["missing"]
    assert "adds 7 channels to conv_in, this model has 64 channels" in told["wide"]
    assert set(told["names"]) >= {"new.safetensors", "stirred.safetensors"}


@pytest.fixture(scope="module")
def copied(random_tiny: dict[str, Path], run_inside: Callable[..., str], tmp_path_factory: Any) -> dict[str, Any]:
    said = run_inside("control_copy", random_tiny["tiny"], tmp_path_factory.mktemp("controlnet"))
    return json.loads(said.strip().splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_copy_is_as_a_control_net_what_it_is_as_a_side(copied: dict[str, Any], steps: int) -> None:
    """The same residuals on the skips and the middle, with guidance and without; nothing is left behind."""
    assert copied[f"side {steps}"] < 2e-5 * copied[f"effect {steps}"] and copied[f"effect {steps}"] > 0.1, copied
    assert copied[f"after {steps}"]


def test_cores_own_loader_reads_a_copys_file_as_a_controlnet(copied: dict[str, Any]) -> None:
    assert copied["core"] < 1e-4, copied
