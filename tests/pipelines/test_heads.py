"""Methods with a discriminator head on diffusers' real networks of every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from narrowed import narrowed
from small_host import small
from tiny_pipelines import MAKERS, make

from onestep.core.tensor_file import read_tensors
from onestep.pipelines.adapt import adapt
from onestep.training.distil import distil

TOLD = {"steps": 2, "warm_start": 1, "sizes": "32x32", "batch": 2, "pairs": 2, "teacher_steps": 2, "watch_samples": 4}
TOLD |= {"preview_every": 0, "head_blocks": 2, "critic_warm_up": 1, "head_warm_up": 1, "gan_start": 0.0}
TOLD |= {"gan_ramp": 0.0, "gan_weight": 1.0, "matching_guidance": 1.0, "guidance": 1.0}
LENGTHS = ("z_image", "qwen_image", "krea2", "lumina2", "pixart")
"""Families whose texts are of their own lengths."""


@pytest.mark.parametrize(
    ("family", "method"),
    narrowed(
        [
            (f, m)
            for f in (*MAKERS, "z_image", "klein", "qwen_image", "krea2", "lumina2", "wan", "pixart")
            for m in ("dmd2", "f-distill", "ladd")
        ],
        ("sd3", "dmd2"),
    ),
)
def test_a_run_of_each_family(family: str, method: str, tmp_path: Path) -> None:
    """Head and student both get a gradient, through recomputed blocks; the result loads where it should. Prompts of two
    lengths are two calls of Z-Image."""
    torch.manual_seed(0)
    host = adapt(make(family), device="cpu")
    own = {name: value for name, value in TOLD.items() if name in small(method=method).flat()}
    made = distil(
        host,
        ["a wall", "a red house" + 20 * " cat" * (family in LENGTHS)],
        small(method=method, **own | ({"sizes": "40x40"} if family == "pixart" else {})),
        tmp_path / "run",
    )
    last = made.metrics[-1]
    assert last["head_norm"] > 0 and last["student_norm"] > 0 and last["gan"] == last["gan"]
    assert any(bool(value.any()) for name, value in read_tensors(made.path).items() if "up" in name or "lora_B" in name)
    state = read_tensors(sorted((tmp_path / "run").glob("state-*"))[-1] / "state.safetensors")
    assert len([name for name in state if name.startswith("head/enter") and name.endswith("weight")]) == 2
