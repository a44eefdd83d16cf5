"""Which tokens of a CONDITIONING are a negative's own, in ComfyUI's Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.broad, pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]
LAYOUTS = ("sd15", "sdxl", "sd3", "sd3 without T5", "sd3 with T5 alone", "flux", "klein", "pixart")
# own tokens of "", "a red dragon" by CLIP and by T5, with those that begin and end a text
SHORT = {"sd15": (2, 5), "sdxl": (2, 5), "sd3": (3, 10), "sd3 without T5": (2, 5)}
SHORT |= {"sd3 with T5 alone": (1, 5), "flux": (1, 5), "pixart": (1, 5)}
# with klein's template: 3 before the text, 9 behind it
SHORT |= {"klein": (12, 15)}


@pytest.fixture(scope="module")
def told(run_inside: Callable[..., str]) -> Any:
    return json.loads(run_inside("steer_text", seconds=900).strip().splitlines()[-1])


@pytest.mark.parametrize("text", ["empty", "short", "weighed", "long"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_is_told_from_its_padding(told: Any, layout: str, text: str) -> None:
    """Padded it is CLIP Text Encode's, bit for bit; its own tokens are those of a text that nothing was put behind."""
    same, near, own, padded = told[f"{layout}, {text}"]
    assert same and near and 0 < own <= padded


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_has_as_many_tokens_as_words_and_ends(told: Any, layout: str) -> None:
    assert (told[f"{layout}, empty"][2], told[f"{layout}, short"][2]) == SHORT[layout]


def test_masks_zeros_and_kept_tokens_say_what_is_padding(told: Any) -> None:
    """Behind the last that is no zero (Wan); where a mask ends; also under a timestep range, and combined."""
    assert told["lengths"] == [5, 4, 3, 3]


@pytest.mark.parametrize("name", ["plain", "joined", "zeroed", "mixed"])
def test_what_does_not_say_it_is_refused(told: Any, name: str) -> None:
    """Also a text that was changed after it was encoded: its own tokens are no longer known."""
    assert "CLIP Text Encode (Negative)" in told[f"refused {name}"] and len(told[f"refused {name}"]) < 400


def test_no_text_encoder_is_said(told: Any) -> None:
    assert "no text encoder" in told["refused nothing"]
