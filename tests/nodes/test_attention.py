"""A back end that ONESTEP_ATTENTION names serves a network in training, as ComfyUI's own attention would."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.comfy


def test_what_is_chosen_computes_what_torchs_does(run_inside: Callable[..., str]) -> None:
    """By tokens and by heads, with masks of each kind; a scale of its own is left to torch."""
    told = json.loads(run_inside("attention").strip().splitlines()[-1])
    assert told["calls"] == 5 == len(told["errors"]) and max(told["errors"].values()) < 1e-10, told
