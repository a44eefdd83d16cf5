"""What training asks of a host: a checkpoint as a denoiser, with its text encoder, its decoder and its file check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..core.cond import Cond
from ..core.denoiser import Denoiser
from ..core.licences import Part
from ..core.lora_fused import Host as LoraHost


class Host(Protocol):
    """One loaded checkpoint: a diffusers pipeline or ComfyUI's MODEL, CLIP and VAE."""

    name: str
    """Of the checkpoint, for messages and headers."""
    family: str
    """Its name in `core.families.FAMILIES`."""
    network: nn.Module
    """The denoising network."""
    denoiser: Denoiser
    device: torch.device
    blocks: list[nn.Module]
    """The network's blocks, in order: what gradient checkpointing recomputes one by one."""
    in_place: list[nn.Module]
    """Layers whose input the host overwrites afterwards: they are handed a copy in training."""
    memory_required: int
    """Bytes that training takes beyond the network's own; a host that shares the device with other models makes so much
    room. 0 = not known."""
    streamed: bool
    """Whether ``training`` leaves the network where it is, for its blocks are streamed to the device
    (core.streaming)."""

    @property
    def loader(self) -> LoraHost:
        """Whose own LoRA loader is here."""
        ...

    @property
    def made_of(self) -> Sequence[Part]:
        """The network's checkpoint, and each LoRA that is merged into it."""
        ...

    @property
    def encoder_hash(self) -> str:
        """Of the text encoders' weights; with a prompt it names a cached embedding."""
        ...

    @property
    def base_hash(self) -> str:
        """Of the denoising network's weights, LoRA stack included."""
        ...

    def encode(self, prompts: Sequence[str], size: tuple[int, int], *, negative: bool = False) -> Cond:
        """The conditions of ``prompts`` at ``size`` (width, height) in pixels, on the CPU, float32. negative: whether
        they are negatives, which some families read without a system prompt."""
        ...

    def texts(self, prompts: Sequence[str], *, negative: bool = False) -> Cond:
        """What ``encode`` gives without what a size adds, on the CPU, in the encoders' own dtype."""
        ...

    def with_sizes(self, cond: Cond, size: tuple[int, int]) -> Cond:
        """``cond`` of ``texts`` with what this network is told of ``size``."""
        ...

    def encoding(self) -> AbstractContextManager[None]:
        """Within, many texts are encoded: the text encoder may take the network's place on the training device."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] latents in the model's own scale -> [B, 3, H, W] pictures in [0, 1], on the CPU, float32."""
        ...

    def decoding(self) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Within, what ``decode`` gives, with a gradient in the latents, on their device, and not held to [0, 1]. The
        network may have to make room for it."""
        ...

    def latents_of(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] pictures in [0, 1] -> [B, C, h, w] latents in the model's own scale, of which ``decode`` makes
        them."""
        ...

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """(C, h, w) of latents for a picture of ``size`` (width, height) in pixels. OneStepError where it does not
        fit."""
        ...

    def training(self) -> AbstractContextManager[None]:
        """Within, the network is on the training device and may be differentiated; text encoder and VAE are off it."""
        ...

    def check_file(self, path: Path) -> str:
        """Load the LoRA with the host's own loader and compare every delta; one line that says what was proven."""
        ...

    def poll(self) -> None:
        """Called at every micro-step: raises where the person has cancelled."""
        ...


Shells = Callable[[str], Host]
"""The same host without its weights, on the meta device, with adapters on the targets of that name, as in the settings:
what `training.plan` counts a run on."""
