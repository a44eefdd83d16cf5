"""A control adapter that is a copy: ControlNet (arXiv:2302.05543) for a U-Net of SD1.5, SD2 or SDXL.

    y = F(x; W) + Z(F(x + Z(c); W_copy))                                           (Eq. 2, Z: zero convolutions)

A trainable copy of the encoder and the middle sees the noisy latents, the prompt and the control; what its blocks find
is added to the network's skips and its middle. Parameters bear diffusers' names of a ControlNetModel, so that its file
is a ControlNet to either host's own loader. Ours: the control's encoder ends in drawn weights, not zeros; the last
zero convolutions alone hold a new copy at F, and these see the control from the first update on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from . import randomness
from .adapter_module import Call
from .control import ControlAdapter, Place, grid_of
from .errors import OneStepError
from .factors import State
from .stored import weight_of
from .targets import Target
from .unet_parts import GROUPS, Down, Embedding, Hint, Middle, waves

REDUCTION = 8
"""Pixels of the control along a side of a latent, as ControlNet's encoder of it takes them."""
GAIN = 1.68
"""E[silu(n)^2]^(-1/2) for standard normal n: through the control's encoder numbers keep their size."""
MOST_LEVELS, MOST_BLOCKS, WIDEST = 8, 64, 65536


@dataclass(frozen=True)
class Level:
    """width: channels. blocks: residual blocks. depth: transformer blocks behind each; 0 = none. heads: of theirs."""

    width: int
    blocks: int
    depth: int
    heads: int


@dataclass(frozen=True)
class CopyConfig:
    """What a copy is.

    control, channels, cell: as in `ControlConfig`, of the control pictures. latents: the network's input channels.
    text: channels of the prompt's tokens. vector: numbers of the pooled text and sizes (SDXL), or 0. linear: whether
    transformers begin and end in linear layers. levels: finest first; middle: of two blocks.
    """

    control: str
    channels: int
    cell: int
    latents: int
    text: int
    vector: int
    linear: bool
    levels: tuple[Level, ...]
    middle: Level
    seed: int = 0

    def __post_init__(self) -> None:
        every = (*self.levels, self.middle)
        numbers = [self.channels, self.cell, self.latents, self.text]
        numbers += [number for one in every for number in (one.width, one.blocks, one.heads)]
        fits = all(type(number) is int and 1 <= number <= WIDEST for number in numbers)
        fits &= all(type(one.depth) is int and 0 <= one.depth <= MOST_BLOCKS >= one.blocks for one in every)
        fits &= 1 <= len(self.levels) <= MOST_LEVELS and type(self.vector) is int and 0 <= self.vector <= WIDEST
        if not fits or any(one.width % GROUPS or one.width % one.heads for one in every):
            raise OneStepError(f"no copy of a U-Net has {numbers}"[:300])

    @property
    def places(self) -> tuple[Place, ...]:
        """The layers that write what the copy adds to: skips in the order in which the U-Net makes them, then its
        middle."""
        found = [Place("conv_in", self.levels[0].width, 1)]
        for at, level in enumerate(self.levels):
            last = "attentions.{}.proj_out" if level.depth else "resnets.{}.conv2"
            names = [f"down_blocks.{at}.{last.format(block)}" for block in range(level.blocks)]
            found += [Place(name, level.width, 2**at) for name in names]
            if at + 1 < len(self.levels):
                found.append(Place(f"down_blocks.{at}.downsamplers.0.conv", level.width, 2 ** (at + 1)))
        return (*found, Place("mid_block.resnets.1.conv2", self.middle.width, 2**at))


class ControlCopy(nn.Module):
    """Told `control` and `strength` by `Roles.use` as `ControlAdapter` is; vector no control, it is not there."""

    kind = "control copy"

    def __init__(self, config: CopyConfig) -> None:
        super().__init__()
        self.config, levels = config, config.levels
        self.before, self.after = frozenset[str](), frozenset[str]()
        with torch.random.fork_rng(devices=[]):  # torch's layers draw their own start, which is not used
            first, wide = levels[0].width, 4 * levels[0].width
            self.conv_in = nn.Conv2d(config.latents, first, 3, padding=1)
            self.time_embedding = Embedding(first, wide)
            self.add_embedding = Embedding(config.vector, wide) if config.vector else None
            self.controlnet_cond_embedding = Hint(3 if config.channels == 1 else config.channels, first)
            inputs = [first, *(level.width for level in levels)]
            self.down_blocks = nn.ModuleList(
                Down(inputs[at], level.width, level.blocks, wide, _of(config, level), at + 1 < len(levels))
                for at, level in enumerate(levels)
            )
            self.mid_block = Middle(config.middle.width, wide, _of(config, config.middle))
            *skips, middle = config.places
            self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(p.channels, p.channels, 1) for p in skips)
            self.controlnet_mid_block = nn.Conv2d(middle.channels, middle.channels, 1)
        self._start(config.seed)

    @classmethod
    def from_config(cls, **config: Any) -> ControlCopy:
        """Of the entries of `CopyConfig`, as a file's header tells them."""
        levels, middle = tuple(Level(**level) for level in config.pop("levels")), Level(**config.pop("middle"))
        return cls(CopyConfig(levels=levels, middle=middle, **config))

    @torch.no_grad()
    def _start(self, seed: int) -> None:
        """Matrices from (seed, name): normal, GAIN / sqrt(fan in); norms one, biases and the zero convolutions zero."""
        for name, value in self.named_parameters():
            zero = re.match(r"controlnet_(down|mid)_block", name) is not None or name.endswith("bias")
            if zero or value.ndim == 1:
                value.fill_(0.0 if zero else 1.0)
            else:
                drawn = torch.randn(value.shape, generator=randomness.generator(seed, "control copy", name))
                value.copy_(GAIN * drawn / value[0].numel() ** 0.5)

    def forward(self, x: Tensor, time: Tensor, text: Tensor, control: Tensor, **more: Any) -> list[Tensor]:
        """What is added to each place. x: what the U-Net takes, [B, C, h, w]. time [B]. text [B, L, .]. control
        [B, ., H, W]. more: mask [B, L], vector [B, .] (pooled text and sizes)."""
        own = self.conv_in.weight
        x, text = x.to(own), text.to(own)
        spread = self.time_embedding(waves(time.to(own), self.config.levels[0].width))
        if self.add_embedding is not None:
            spread = spread + self.add_embedding(more["vector"].to(own))
        h = self.conv_in(x) + self.controlnet_cond_embedding(self._hint(control.to(own), x))
        found = [h]
        for block in self.down_blocks:
            found += (made := block(h, spread, text, more.get("mask")))
            h = made[-1]
        h = self.mid_block(h, spread, text, more.get("mask"))
        skips = [zero(skip) for zero, skip in zip(self.controlnet_down_blocks, found, strict=True)]
        return [*skips, self.controlnet_mid_block(h)]

    def _hint(self, control: Tensor, x: Tensor) -> Tensor:
        """The control as ControlNet's encoder takes it: in colours, REDUCTION pixels for each latent."""
        control = control.expand(-1, 3, -1, -1) if control.shape[1] == 1 else control
        size = x.shape[2] * REDUCTION, x.shape[3] * REDUCTION
        return control if control.shape[2:] == size else interpolate(control, size, mode="nearest-exact")

    def residuals(self, x: Tensor, call: Call) -> list[Tensor] | None:
        """What a call that serves this adapter adds to the U-Net that takes ``x``, or None."""
        control = call.inputs.get("control")
        if control is None:
            return None
        grid_of(self.config, control, x)
        control = control.repeat(len(x) // len(control), 1, 1, 1)
        cond, strength = call.cond, float(call.inputs.get("strength", 1.0))
        found = self(
            x, call.time, cond.text.to(x.device), control, mask=cond.mask, vector=vector_of(cond, self.config.vector)
        )
        return [(strength * residual).to(x.dtype) for residual in found]

    def on_input(self, name: str, x: Tensor, call: Call) -> Tensor:
        return x

    def on_output(self, name: str, x: Tensor, output: Tensor, call: Call) -> Tensor:
        return output


MAKERS = {"control": ControlAdapter.from_config, ControlCopy.kind: ControlCopy.from_config}
"""The control adapters by kind, for `adapter_file.load_adapter`."""


def _of(config: CopyConfig, level: Level) -> tuple[int, int, int, bool]:
    """(heads, depth, text, linear) of a level's transformers."""
    return level.heads, level.depth, config.text, config.linear


def vector_of(cond: Any, vector: int) -> Tensor | None:
    """[B, vector]: SDXL's pooled text and its six sizes, as its U-Net is vector them; None for others."""
    if not vector:
        return None
    width = (vector - cond.pooled.shape[1]) // cond.size.shape[1]
    sizes = waves(cond.size.flatten(), width).reshape(len(cond.size), -1)
    return torch.cat([cond.pooled.to(sizes), sizes], 1)


# -- from a U-Net -----------------------------------------------------------------------------------------------------

Parts = Mapping[str, nn.Module]
"""A U-Net's norms and attentions, by diffusers' names."""


def new_copy(
    targets: Mapping[str, Target],
    parts: Parts,
    control: tuple[str, int],
    cell: int,
    factors: State,
    *,
    seed: int = 0,
) -> ControlCopy:
    """A copy of the U-Net of all these targets as it is with the low-rank ``factors``. control: (name, channels).
    cell: pixels along a side of a latent. Raises OneStepError where layers are not adapted."""
    if "conv_in" not in targets or "mid_block.resnets.1.conv2" not in targets:
        raise OneStepError("a copy is made of a U-Net whose layers are all adapted: set targets to all")
    copy = ControlCopy(config_of(targets, parts, control, cell, seed))
    state = {name: value for name, value in copy.state_dict().items() if not name.startswith("controlnet_")}
    with torch.no_grad():
        for name, value in state.items():
            path, leaf = name.rsplit(".", 1)
            value.copy_(_weight(targets[path], factors, leaf) if path in targets else getattr(parts[path], leaf))
    return copy


def config_of(
    targets: Mapping[str, Target], parts: Parts, control: tuple[str, int], cell: int, seed: int = 0
) -> CopyConfig:
    """Read from the names and shapes of the U-Net's layers."""

    def level(block: str) -> Level:
        blocks = _count(targets, rf"{block}\.resnets\.(\d+)\.conv1")
        depth = _count(targets, rf"{block}\.attentions\.0\.transformer_blocks\.(\d+)\.attn1\.to_q")
        heads = int(parts[f"{block}.attentions.0.transformer_blocks.0.attn1"].heads) if depth else 1  # type: ignore[arg-type]
        return Level(targets[f"{block}.resnets.0.conv2"].out_rows, blocks, depth, heads)

    levels = _count(targets, r"down_blocks\.(\d+)\.resnets\.0\.conv1")
    text = next(target for name, target in targets.items() if name.endswith("attn2.to_k"))
    more, first = targets.get("add_embedding.linear_1"), targets["conv_in"]
    entry = next(target for name, target in targets.items() if name.endswith("attentions.0.proj_in"))
    return CopyConfig(
        *control, cell, first.in_features, text.in_features, more.in_features if more else 0, not entry.is_conv,
        tuple(level(f"down_blocks.{at}") for at in range(levels)), level("mid_block"), seed,
    )  # fmt: skip


def _count(names: Iterable[str], pattern: str) -> int:
    """How many numbers ``pattern`` has among ``names``."""
    return len({found[1] for name in names if (found := re.fullmatch(pattern, name))})


def _weight(target: Target, factors: State, leaf: str) -> Tensor:
    """The base's weight and, of a matrix, the product of its factors; or the bias."""
    value = weight_of(target.module) if leaf == "weight" else getattr(target.module, leaf).detach().float()
    if leaf == "bias" or target.name not in factors:
        return value  # type: ignore[no-any-return]
    a, b = (factor.float().to(value) for factor in factors[target.name])
    return value + (b.flatten(1) @ a.flatten(1)).reshape(value.shape)  # type: ignore[no-any-return]
