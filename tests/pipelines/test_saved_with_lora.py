"""A pipeline saved with a LoRA on it is read back as what it was, and stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import random_lora
from narrowed import narrowed
from tiny_pipelines import make
from torch import Tensor

from onestep.pipelines.one_step import OneStepPipeline

PRESETS = {"sd": "sd-turbo-1", "sdxl": "sdxl-turbo-1", "sd3": "sd3.5-turbo-4", "flux": "flux-schnell-4"}


def drawn(pipe: Any, recipe: str) -> Tensor:
    call = {"width": 16, "height": 16, "output_type": "latent", "seed": 3, "recipe": recipe}
    return pipe("a red cat", **call).images


FOLDERS = [(name, style) for name in PRESETS for style in (False, True)]


@pytest.mark.parametrize(("name", "style"), narrowed(FOLDERS, ("sd", True), ("flux", False)))
def test_the_folder_draws_the_same_picture(name: str, style: bool, tmp_path: Path) -> None:
    """With a style LoRA beside the one-step LoRA too, at a strength of its own."""
    fast = OneStepPipeline.from_pipe(make(name))
    without = drawn(fast, PRESETS[name])
    if style:
        random_lora(make(name), tmp_path / "style.safetensors", None)
        fast.plain().load_lora_weights(str(tmp_path), weight_name="style.safetensors", adapter_name="style")
    fast.load_one_step_lora(random_lora(make(name), tmp_path / "x.safetensors", None), PRESETS[name])
    before = drawn(fast, PRESETS[name])
    fast.save_pretrained(tmp_path / "saved")
    assert torch.equal(drawn(fast, PRESETS[name]), before)
    again = drawn(OneStepPipeline.from_pretrained(tmp_path / "saved"), PRESETS[name])
    assert float((before - without).abs().max()) > 0.05
    torch.testing.assert_close(again, before, rtol=1e-4, atol=1e-4 * float(before.std()))
