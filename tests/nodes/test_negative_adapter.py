"""Apply Negative Adapter in a real ComfyUI: the trainer's own numbers, on and off, with CFG and without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from onestep.pipelines.adapt import adapt, denoiser_of
from onestep.pipelines.negative_adapter import load_negative_adapter
from onestep.training.distil import distil
from onestep.training.methods import settings_for

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def measured(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return json.loads(run_inside("negative_adapter", tmp_path_factory.mktemp("adapter")).strip().splitlines()[-1])


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_the_guider_sees_what_the_trainer_trained(measured: Any, kind: str) -> None:
    found = measured[kind]
    assert found["effect"] > 0.02 and found["another"] > 0.02 and found["the trainer's"] < 1e-4
    assert found["plain again"] == found["away again"] == found["off"] == found["hooks left"] == 0


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_rows_have_their_own_negatives(measured: Any, kind: str) -> None:
    assert max(measured[kind][name] for name in ("with CFG", "combined", "of a batch")) < 1e-4


def test_what_does_not_fit_is_refused(measured: Any) -> None:
    words = [
        *("this adapter is for another base", "which this 'sd3' model has not", "scale is nan", "scale is 11.0"),
        *("tokens are 2048 wide", "holds no text", "from 0.2 to 1 of the schedule", "has a negative adapter already"),
    ]
    assert len(measured["said"]) == len(words)
    for said, word in zip(measured["said"], words, strict=True):
        assert word in said


# -- the other host ---------------------------------------------------------------------------------------------------

TOLD: dict[str, Any] = {
    "prompts": ["a dragon, red", "a wall: grey, dark"],
    "negatives": ["red", "a tall dark wall"],
    "settings": {
        **{"method": "sun", "sizes": "32x32", "steps": 3, "batch": 2, "pairs": 4, "learning_rate": 0.05, "warm_up": 0},
        **{"watch_every": 0, "preview_every": 0, "ema": 0.0, "guidance": 3.0, "push": 2.0, "segment_steps": 2},
    },
}


def test_both_hosts_train_and_draw_the_same(random_tiny: Any, run_inside: Callable[..., str], tmp_path: Path) -> None:
    """The same seed, prompts and settings make the same adapter; one file gives the same numbers."""
    draw = torch.Generator().manual_seed(1)
    given = {"x": torch.randn(2, 4, 8, 8, generator=draw), "sigma": torch.tensor([0.7, 0.95])}
    (tmp_path / "told.json").write_text(json.dumps(TOLD))
    save_file(given, tmp_path / "in.safetensors")
    run_inside("negative_hosts", random_tiny["tiny"], tmp_path)
    theirs = load_file(tmp_path / "out.safetensors")
    pipe = DiffusionPipeline.from_pretrained(random_tiny["tiny"])
    host = adapt(pipe, device="cpu")
    prompts, negatives = (host.encode(TOLD[name], (32, 32)) for name in ("prompts", "negatives"))
    ours = distil(host, TOLD["prompts"], settings_for(**TOLD["settings"]), tmp_path / "diffusers").path
    host.release()
    sigma = given["sigma"].double()
    found = []
    with torch.no_grad():
        torch.testing.assert_close(denoiser_of(pipe)(given["x"], sigma, prompts), theirs["plain"], rtol=1e-5, atol=1e-5)
        for file in (tmp_path / "comfy" / "result.safetensors", ours):
            with load_negative_adapter(pipe, file, negatives.text, scale=1.5):
                found.append(denoiser_of(pipe)(given["x"], sigma, prompts))
    torch.testing.assert_close(found[0], theirs["x0"], rtol=1e-5, atol=1e-5)
    effect = float((found[0] - theirs["plain"]).abs().max())
    # Adam makes whole steps of gradients that are all but zero, whose sign is rounding's
    assert effect > 1e-2 and float((found[1] - found[0]).abs().max()) < 0.02 * effect
