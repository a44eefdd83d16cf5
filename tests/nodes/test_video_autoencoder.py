"""An autoencoder of videos in both hosts, on the same weights: pictures have the same latents, and come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from safetensors.torch import load_file, save_file
from tiny_pipelines import video_vae

from onestep.pipelines.autoencoder import decoded, encoded

pytestmark = pytest.mark.comfy


@torch.no_grad()
@pytest.mark.parametrize("cls", [AutoencoderKLQwenImage, AutoencoderKLWan])
def test_pictures_have_the_same_latents_and_come_back(
    cls: type, run_inside: Callable[..., str], tmp_path: Path
) -> None:
    """ComfyUI takes a batch of pictures for the frames of one video: each is encoded alone."""
    made, pictures = video_vae(cls), torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    made.save_pretrained(tmp_path / "model" / "vae")
    save_file({"pictures": pictures}, tmp_path / "pictures.safetensors")
    run_inside("video_autoencoder", tmp_path / "model", tmp_path)
    found, latents = load_file(tmp_path / "out.safetensors"), encoded(made, pictures)
    assert found["latents"].shape == (2, 16, 1, 4, 6) and found["colours"].shape == (16, 3)
    torch.testing.assert_close(found["latents"].squeeze(2), latents, rtol=0, atol=1e-4 * float(latents.abs().max()))
    torch.testing.assert_close(found["decoded"], decoded(made, latents), rtol=0, atol=1e-4)
