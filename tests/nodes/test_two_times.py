"""In ComfyUI as in diffusers a network is told any time, and the second one of a flow map by half."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("name", ["tiny", pytest.param("tiny-flow", marks=pytest.mark.broad)])
def test_what_the_network_is_told(
    name: str, random_tiny: dict[str, Path], run_inside: Callable[..., str], tmp_path: Path
) -> None:
    run_inside("two_times", random_tiny[name], tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    plain, anywhere, between, twin, after = (np.array(times) for times in found["told"])
    t, r = np.array(found["times"]), np.array(found["ends"])
    # of a discrete model the nearest index
    np.testing.assert_allclose(plain, t, atol=0.51 if name == "tiny" else 1e-3)
    np.testing.assert_allclose(anywhere, t, atol=1e-3)
    np.testing.assert_allclose(between, t - r / 2, atol=1e-3)
    # the picture has no other side, and the least level of a discrete model is not yet the picture
    np.testing.assert_allclose(twin, np.where((r > 0) | (name == "tiny"), r / 2 - t, t), atol=1e-3)
    np.testing.assert_array_equal(after, plain)
    assert found["updates"] == 2
