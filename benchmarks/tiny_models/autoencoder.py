"""The KL autoencoder of the tiny models: 32x32 RGB to 4 x 8x8 latents, and its training."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .loop import Plan, Training


def build() -> AutoencoderKL:
    """Fresh autoencoder, factor 4, widths 32-64-64, no attention."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        mid_block_add_attention=False,
        sample_size=32,
    )


def train(
    images: Tensor, plan: Plan, folder: Path, kl_weight: float, start: AutoencoderKL | None = None, batch: int = 32
) -> AutoencoderKL:
    """The trained autoencoder, whose scaling_factor gives its latents unit standard deviation.

    images: [N, 3, 32, 32] in [-1, 1]; start: an autoencoder to train further.
    """
    torch.manual_seed(plan.seed)
    vae = (start or build()).train()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        x = augmented(images[torch.randint(len(images), (batch,), generator=generator)], generator)
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        error = vae.decode(z).sample - x
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        # Errors of 4x4 means are errors of colour: without their own term small networks draw in two hues for long.
        tint = torch.nn.functional.avg_pool2d(error, 4).abs().mean()
        return error.abs().mean() + 0.5 * error.square().mean() + 2.0 * tint + kl_weight * kl

    Training(vae, plan, folder).run(loss)
    vae.register_to_config(scaling_factor=float(1.0 / encode(vae, images).std()))
    return vae.eval()


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures [B, 3, H, W] mirrored; half with red, green and blue shuffled.

    Most colours lie near the line from orange to blue, and a small network stays on it; shuffled ones span the plane.
    """
    flip, shuffle = torch.rand(2, len(x), 1, 1, 1, generator=generator) < 0.5
    order = torch.rand(len(x), 3, generator=generator).argsort(dim=1)
    shuffled = x[torch.arange(len(x))[:, None], order]
    x = torch.where(shuffle, shuffled, x)
    return torch.where(flip, x.flip(-1), x)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, batch: int = 256) -> Tensor:
    """Posterior means [N, 4, 8, 8], unscaled, of images [N, 3, 32, 32] in [-1, 1]."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(batch)])


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of the reconstructions."""
    back = torch.cat([vae.decode(part).sample for part in encode(vae, images).split(256)])
    error = ((back - images).clamp(-2, 2) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * error.log10()).mean())
