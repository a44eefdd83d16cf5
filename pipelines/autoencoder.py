"""Latents and pictures by a pipeline's own autoencoder, in tiles or on the CPU where a card has no room for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
)
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ..core.errors import OneStepError
from ..core.memory import attempt, exhausted, notice
from .places import on_device

VAE = (
    AutoencoderKL
    | AutoencoderTiny
    | AsymmetricAutoencoderKL
    | ConsistencyDecoderVAE
    | AutoencoderKLFlux2
    | AutoencoderKLQwenImage
    | AutoencoderKLWan
)
WHAT = "the autoencoder"
TILED = f"out of memory: {WHAT} draws in tiles from here on"
ON_CPU = f"out of memory: {WHAT} draws on the CPU from here on, which takes longer"


class Autoencoder:
    """A pipeline's VAE, one picture at a time. Where memory runs out, it goes on in tiles; where it runs out in tiles
    too, on the CPU; and from there on so."""

    def __init__(self, vae: Any, device: torch.device) -> None:
        self.vae = vae
        # the ways that are left, the best first
        self._ways: list[tuple[str, torch.device, bool]] = [("", device, False)]
        if hasattr(vae, "enable_tiling") and hasattr(vae, "use_tiling"):
            self._ways.append((TILED, device, True))
        if device.type != "cpu":
            self._ways.append((ON_CPU, torch.device("cpu"), False))

    @torch.no_grad()
    def decode(self, latents: Tensor, draws: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] pictures in [0, 1], on the CPU. draws: a generator or None a picture."""
        pairs = zip(latents.split(1), draws, strict=True)
        return torch.cat([self._made(lambda z, draw=draw: decoded(self.vae, z, draw), one) for one, draw in pairs])  # type: ignore[misc]

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] pictures in [0, 1] -> latents (the posterior's mode) in the model's own scale, on the CPU."""
        return torch.cat([self._made(lambda x: encoded(self.vae, x), one) for one in pictures.split(1)])

    def _made(self, work: Callable[[Tensor], Tensor], one: Tensor) -> Tensor:
        """``work`` of ``one``, in the first way that has the room."""
        while True:
            _, device, tiled = self._ways[0]
            with on_device(device, self.vae), upcast(self.vae, device.type == "cpu"), _tiles(self.vae, tiled):
                found, why = attempt(lambda device=device: work(one.to(device)).cpu())  # type: ignore[misc]
            if found is not None:
                return found
            if len(self._ways) == 1:
                raise exhausted(WHAT, why)
            self._ways.pop(0)
            notice(self._ways[0][0])


def decoded(vae: Any, latents: Tensor, generator: Any = None) -> Tensor:
    """[B, 3, H, W] pictures in [0, 1] of [B, C, h, w] latents in the model's own scale, on their device."""
    return burnt(vae, latents, generator).clamp(0, 1)


def burnt(vae: Any, latents: Tensor, generator: Any = None) -> Tensor:
    """The same, as far beyond [0, 1] as the decoder draws them."""
    own = _unscaled(vae, latents.float()).to(vae.dtype)
    pictures: Tensor
    if of_video(vae):  # which draws no noise
        pictures = vae.decode(own.unsqueeze(2), return_dict=False)[0].squeeze(2)
    else:
        pictures = vae.decode(own, return_dict=False, generator=generator)[0]
    return pictures.float() / 2 + 0.5


@contextmanager
def differentiable(vae: Any, device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within, a decoder with a gradient in the latents, on ``device``; of its own weights there is none."""
    flags = [(weight, weight.requires_grad) for weight in vae.parameters()]
    try:
        vae.requires_grad_(False)
        with on_device(device, vae), upcast(vae, device.type == "cpu"):
            yield lambda latents: burnt(vae, latents)
    finally:
        for weight, flag in flags:
            weight.requires_grad_(flag)


def encoded(vae: Any, pictures: Tensor) -> Tensor:
    """The other way: latents (the posterior's mode) of pictures in [0, 1], on their device."""
    x = (2 * pictures - 1).to(vae.dtype)
    if of_video(vae):
        return _scaled(vae, mode_of(vae.encode(x.unsqueeze(2))).squeeze(2).float())
    return _scaled(vae, mode_of(vae.encode(x)).float())


def of_video(vae: Any) -> bool:
    """Whether it takes and gives [B, C, T, H, W], of which a picture is T = 1, as Wan's and Qwen-Image's."""
    return "temperal_downsample" in vae.config  # spelled so in diffusers


def factor_of(vae: Any) -> int:
    """Pixels along a side of one of its latents."""
    if of_video(vae):
        return int(vae.spatial_compression_ratio)
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _unscaled(vae: Any, latents: Tensor) -> Tensor:
    """The autoencoder's own latents of those in the model's scale."""
    if _folds(vae):
        return _unfolded(vae, latents)
    if of_video(vae):
        mean, deviation = _channels(vae)
        return latents * deviation.to(latents) + mean.to(latents)
    return latents / vae.config.scaling_factor + _shift_factor(vae)


def _scaled(vae: Any, own: Tensor) -> Tensor:
    """The other way."""
    if _folds(vae):
        return _folded(vae, own)
    if of_video(vae):
        mean, deviation = _channels(vae)
        return (own - mean.to(own)) / deviation.to(own)
    return (own - _shift_factor(vae)) * vae.config.scaling_factor


def _channels(vae: Any) -> tuple[Tensor, Tensor]:
    """[C, 1, 1] each: the mean and the deviation of each channel, over what it was trained on."""
    told = vae.config.latents_mean, vae.config.latents_std
    mean, deviation = (torch.tensor(value)[:, None, None] for value in told)
    return mean, deviation


def _folds(vae: Any) -> bool:
    """Whether 2 x 2 of its latents are one of the network's, as FLUX.2's, normed by the statistics of its BatchNorm."""
    return getattr(vae, "bn", None) is not None


def _folded(vae: Any, latents: Tensor) -> Tensor:
    """[B, C, 2 h, 2 w] -> [B, 4 C, h, w] of mean 0 and deviation 1, over what it was trained on."""
    mean, deviation = _statistics(vae)
    return (pixel_unshuffle(latents, 2) - mean) / deviation


def _unfolded(vae: Any, latents: Tensor) -> Tensor:
    mean, deviation = _statistics(vae)
    return pixel_shuffle(latents * deviation + mean, 2)


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """[C, 1, 1] each."""
    mean, variance = (value.float()[:, None, None] for value in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config.batch_norm_eps).sqrt()


def _shift_factor(vae: Any) -> float:
    """Zero where the configuration has none, as AsymmetricAutoencoderKL's."""
    return float(vae.config.get("shift_factor") or 0.0)


def mode_of(encoded: Any) -> Tensor:
    """The latents of an encoder's answer: AutoencoderTiny's are no distribution."""
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()


def refuse_decoder_alone(vae: Any, name: str) -> None:
    """Raises OneStepError for a VAE without its encoder."""
    if getattr(vae, "encoder", vae) is None:
        raise OneStepError(f"{name}'s VAE has no encoder, so no picture can be given to it: use a whole one")


@contextmanager
def upcast(vae: Any, on_cpu: bool = False) -> Iterator[None]:
    """SDXL's own VAE overflows in float16, and the CPU is slow in it: within, they compute in float32."""
    dtype = vae.dtype
    widen = dtype == torch.float16 and (vae.config.get("force_upcast", False) or on_cpu)
    if widen:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if widen:
            vae.to(dtype)


@contextmanager
def _tiles(vae: Any, tiled: bool) -> Iterator[None]:
    """Within, in tiles where ``tiled``; otherwise as the pipeline has it."""
    before = getattr(vae, "use_tiling", False)
    if tiled:
        vae.enable_tiling()
    try:
        yield
    finally:
        if tiled:
            vae.use_tiling = before


def native_size(pipe: Any, network: Any) -> tuple[int, int]:
    """(width, height) in pixels at which a model was trained: by its network's configuration, its VAE's, or what its
    pipeline draws where nobody says a size."""
    if told := network.config.get("sample_size"):
        factor = factor_of(pipe.vae)
        height, width = (told, told) if isinstance(told, int) else told
        return width * factor, height * factor
    usual = signature(type(pipe).__call__).parameters
    sides = (usual[side].default if side in usual else None for side in ("width", "height"))
    width, height = (pipe.vae.config.get("sample_size") or side or 1024 for side in sides)
    return width, height
