"""Negative Steering beside whatever else a run holds, what it refuses, and under torch.compile; in ComfyUI's Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.broad, pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]
EACH = ("sd15", "sd3", "flux", "flux2", "z_image", "pixart")
EXACT = 1e-5  # of the oracle's standard deviation


@pytest.fixture(scope="module")
def told(run_inside: Callable[..., str]) -> Any:
    return json.loads(run_inside("steer_beside", seconds=900).strip().splitlines()[-1])


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("name", ["neutral", "defaults", "no_leak", "training"])
def test_facts(told: Any, name: str, kind: str) -> None:
    """Neutral is bit for bit none; scale 0 is the safe one; clones and the original stay apart; idle in training."""
    assert told[f"{name} {kind}"] is True


def test_a_video_networks_default_is_its_own(told: Any) -> None:
    assert told["defaults wan"] is True


@pytest.mark.parametrize("kind", EACH)
def test_one_row_a_step_at_cfg_1(told: Any, kind: str) -> None:
    assert told[f"forwards {kind}"] == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("name", ["guided", "ranges", "zero_out", "areas", "deep_clone"])
def test_every_network_beside(told: Any, name: str, kind: str) -> None:
    """CFG, timestep ranges, ConditioningZeroOut, areas of the positive, deep clones: each as its own expectation. An
    area of PixArt's smallest picture would be too small for it."""
    assert (name, kind) == ("areas", "pixart") or told[f"{name} {kind}"] < EXACT


@pytest.mark.parametrize("kind", EACH)
def test_rows_of_a_batch_do_not_see_each_other(told: Any, kind: str) -> None:
    error, with_cfg = told[f"batches {kind}"]
    assert error < EXACT and with_cfg


@pytest.mark.parametrize("kind", EACH)
def test_half_precision_loses_no_more_than_the_plain_network(told: Any, kind: str) -> None:
    assert max(told[f"dtypes {kind}"].values()) < 2


@pytest.mark.parametrize("kind", ["sd15", "pixart"])
def test_a_blocks_keys_of_the_negative_are_made_once_a_run_and_then_forgotten(told: Any, kind: str) -> None:
    count, gone = told[f"kept {kind}"]
    assert count == [1, 2] and gone == [True, True]


def test_the_log_says_once_what_cfg_does(told: Any) -> None:
    assert told["said sd3"] == [0, 1]


@pytest.mark.parametrize("name", ["ip_adapter sd15", "ip_adapter sdxl", "loras sd15", "weight_hooks sd15"])
def test_patches_of_a_unet_before_and_after(told: Any, name: str) -> None:
    assert told[name] < EXACT


def test_an_inpainting_model(told: Any) -> None:
    assert told["inpainting inpaint"] < EXACT


def test_a_controlnet_sees_the_positive_alone(told: Any) -> None:
    error, matters = told["controlnet sd15"]
    assert error < EXACT and matters


def test_an_earlier_override_keeps_the_pictures_own_attention(told: Any) -> None:
    error, seen = told["earlier_override sd35"]
    assert error < EXACT and seen == [16]


@pytest.fixture(scope="module")
def refusals(run_inside: Callable[..., str]) -> Any:
    return json.loads(run_inside("steer_refused", seconds=600).strip().splitlines()[-1])


WORDS = {
    "width sd15": ("1024", "768", "CLIP"),
    "width sd3": ("1024", "4096"),
    "width flux": ("1024", "4096"),
    "layers sd3": ("decoder", "U-Nets", "sd3"),
    "layers encoder": ("no cross-attention in its decoder", "all"),
    "pooled": ("pooled", "CLIP"),
    "no empty text": ("empty text", "PERP", "CLIP Text Encode", "`empty`"),
    "empty text's width": ("empty text", "1024", "768"),
    "empty text's range": ("empty text", "timestep range"),
    **{f"{name} {value}": (name, value) for name, value in (("weight", "nan"), ("weight", "-1.0"))},
    **{f"keep {value}": ("keep", value) for value in ("nan", "101.0")},
    "empty": ("no text",),
    **{key: (key, "without") for key in ("area", "mask", "strength")},
    **{f"scale {value}": ("scale", value) for value in ("nan", "inf", "-1.0", "101.0")},
    **{name: tuple(name.split()) for name in ("tau nan", "tau 0.5", "alpha nan", "alpha 2.0")},
    "range 0.5 0.5": ("0.5", "start_percent"),
    "range 0.7 0.2": ("0.7", "0.2"),
    "range nan 1.0": ("nan",),
    "range 0.0 nan": ("nan",),
    "range -0.1 1.0": ("-0.1",),
    "twice": ("already", "Combine"),
    "reference": ("reference pictures", "ReferenceLatent"),
    "not served: numbered": ("Flux", "positions", "FLUX.2"),
    "not served: pixart alpha": ("PixArt-Alpha", "SD1.5", "PixArt-Sigma"),
    "not served: video unet": ("SVD", "video"),
    "dual guider": ("Dual CFG Guider", "Basic Guider"),
    "masked": ("masked",),
    "masked prompt": ("mask over its 9 tokens", "CLIP Text Encode"),
    "style": ("style",),
    "tokens": ("16 tokens", "14", "another patch"),
    "tokens, vsf": ("32 tokens", "16"),
    "padded": ("padding", "CLIP Text Encode (Negative)", "Conditioning (Combine)"),
    "batch": ("2 pictures of 1",),
    "blind": ("not reached",),
}


@pytest.mark.parametrize("name", WORDS)
def test_what_cannot_be_steered_is_refused_with_a_word(refusals: Any, name: str) -> None:
    message = refusals[name]
    assert message and len(message) < 400 and all(word in message for word in WORDS[name]), message


def test_every_refusal_is_looked_at(refusals: Any) -> None:
    assert set(refusals) == set(WORDS)


@pytest.mark.slow
@pytest.mark.broad
def test_compiled_networks_draw_the_same(run_inside: Callable[..., str]) -> None:
    """Plain, steered, steered in part, plain again: no graph serves another form, though guards on patches are off."""
    found = json.loads(run_inside("steer_compiled", seconds=1500).strip().splitlines()[-1])
    assert {name: case["errors"] < EXACT for name, case in found.items()} == dict.fromkeys(found, True)
    assert found["sd15"]["frames"]["ok"] >= 3 and found["flux"]["frames"]["ok"] >= 2, "steered graphs were compiled"
