"""Pictures by an autoencoder of videos: latents [B, 16, h, w] of mean 0 and deviation 1 in each channel, one frame."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from tiny_pipelines import folded_vae, vae, video_vae

from onestep.pipelines.autoencoder import Autoencoder, decoded, encoded, factor_of

CLASSES = [AutoencoderKLQwenImage, AutoencoderKLWan]
PICTURES = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
MEAN, DEVIATION = np.linspace(-0.9, 1.2, 16), np.linspace(0.6, 2.9, 16)


def host_of(made: Any) -> Autoencoder:
    return Autoencoder(made, torch.device("cpu"))


@torch.no_grad()
@pytest.mark.parametrize("cls", CLASSES)
def test_latents_are_one_frame_s_normed_in_each_channel(cls: Any) -> None:
    """Wan-Video/Wan2.1, wan/modules/vae.py: (mu - mean) / std."""
    made = video_vae(cls)
    latents = host_of(made).encode(PICTURES)
    own = made.encode(2 * PICTURES[:, :, None] - 1).latent_dist.mode()
    assert latents.shape == (2, 16, 4, 6) and own.shape == (2, 16, 1, 4, 6)
    expected = (own[:, :, 0].double().numpy() - MEAN[:, None, None]) / DEVIATION[:, None, None]
    np.testing.assert_allclose(latents.numpy(), expected, atol=1e-5 * np.abs(expected).max())
    assert factor_of(made) == 8


@torch.no_grad()
@pytest.mark.parametrize("cls", CLASSES)
def test_they_are_decoded_as_its_own_pipeline_decodes_them(cls: Any) -> None:
    made = video_vae(cls)
    latents = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    own = latents.double().numpy() * DEVIATION[:, None, None] + MEAN[:, None, None]
    frames = made.decode(torch.from_numpy(own).float()[:, :, None]).sample
    pictures = host_of(made).decode(latents, [torch.Generator().manual_seed(2), None])
    assert pictures.shape == (2, 3, 32, 48)
    torch.testing.assert_close(pictures, (frames[:, :, 0] / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_picture_is_the_same_alone_and_in_a_batch() -> None:
    """A batch is no video: nothing passes from one picture to the next."""
    made = video_vae()
    assert torch.allclose(encoded(made, PICTURES)[1:], encoded(made, PICTURES[1:]), atol=1e-5)
    latents = torch.randn(2, 16, 2, 3, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(decoded(made, latents)[1:], decoded(made, latents[1:]), atol=1e-5)


def test_the_factor_of_each_kind() -> None:
    assert [factor_of(made) for made in (vae(), folded_vae(), video_vae(AutoencoderKLWan))] == [2, 2, 8]
