"""Negative steering in ComfyUI against oracles: the doubled form, and attention computed anew behind each block."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]

NETWORKS = ["sd15", "sd2", "sdxl", "sd3", "sd35", "flux", "flux2", "z_image", "qwen_image", "chroma", "krea2", "wan"]
NETWORKS += ["wan-i2v", "pixart", "pixart under a guidance adapter"]
NETWORKS += ["wan-i2v without pictures", "flux with a reference picture", "flux2 with a reference picture"]
NETWORKS += ["flux2, padded behind", "krea2 with a reference picture"]
CHECKPOINTS = ["sd15 checkpoint", "sd3 checkpoint", "flux checkpoint"]
TEXTS = ["longer", "equal", "together as long as the video"]
LAYERS = ["sd15, decoder", "sdxl, decoder"]
LENGTHS = [f"{kind}, {how}" for kind in ("sd15", "sd3", "flux", "flux2", "krea2", "wan", "pixart") for how in TEXTS]


@pytest.fixture(scope="module")
def measured(checkpoints: Path, run_inside: Callable[..., str]) -> Any:
    return json.loads(run_inside("steer_exact", checkpoints).strip().splitlines()[-1])


@pytest.mark.parametrize("case", NETWORKS + CHECKPOINTS + LAYERS + LENGTHS)
def test_one_picture_stream_is_the_oracles(measured: Any, case: str) -> None:
    """SD3 and Flux: batch of two, both texts, the picture's rows of both overwritten after each attention."""
    assert measured[case]
    for form, (apart, effect) in measured[case].items():
        assert apart < 1e-5 and effect > 0.02, (form, apart, effect)
