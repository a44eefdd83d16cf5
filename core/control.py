"""A control adapter: a light encoder of the control picture, whose features are added to a network's residual stream.

    h_i  <-  h_i + strength * F_i(c, x)                    (T2I-Adapter, arXiv:2302.08453, Eq. 2; its F_i sees c alone)

It is an adapter module (core.adapter_module): it knows the stream by the layers that write to it. What a U-Net's
`proj_out` or `conv2` gives is added to the stream by the network itself, so a feature added there is one added behind
the block. Its last layers are zero at the start, so a new one changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_unshuffle

from . import randomness
from .adapter_module import Call
from .errors import OneStepError
from .families import FAMILIES
from .targets import Target

WIDEST, DEEPEST, MOST_PLACES = 4096, 16, 256
AUTOMATIC_WIDTH = 320


@dataclass(frozen=True)
class Place:
    """Where a feature is added. name: the layer. channels: of what it gives. stride: 1 on the finest grid, 2, 4, ..."""

    name: str
    channels: int
    stride: int


@dataclass(frozen=True)
class ControlConfig:
    """What a control adapter is.

    control: the control's name (core.controls). channels: of its pictures. cell: pixels along a side of one cell of the
    finest grid. latents: channels of the network's own input in one cell; 0 = the encoder sees the control alone.
    places: the first is the network's entry. width, depth: channels and residual blocks on the finest grid.
    """

    control: str
    channels: int
    cell: int
    latents: int
    places: tuple[Place, ...]
    width: int = AUTOMATIC_WIDTH
    depth: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = (self.channels, self.cell, self.width, self.depth, *(p.channels for p in self.places))
        strides = [place.stride for place in self.places]
        fits = all(type(number) is int and 1 <= number <= WIDEST for number in (*numbers, *strides))
        fits &= 0 <= self.latents <= WIDEST and self.depth <= DEEPEST and 1 <= len(strides) <= MOST_PLACES
        if not fits or strides[0] != 1 or {*strides} != {2**i for i in range(len({*strides}))}:
            raise OneStepError(f"no control adapter has {numbers} and strides {strides}"[:300])


def places_of(family: str, targets: Mapping[str, Target]) -> tuple[Place, ...]:
    """Where a control acts: in a U-Net behind its first convolution, each block of its encoder and its middle; in a
    transformer on the image stream as it enters the blocks. Raises OneStepError where the entry is not adapted."""
    entry = FAMILIES[family].entry
    if not entry:
        raise OneStepError(f"{FAMILIES[family].models} models cannot have a control adapter yet: use another base")
    if entry not in targets:
        raise OneStepError(f"a control adapter acts on {entry}, which is not adapted here: set targets to all")
    layers = {entry: 1} | (_encoder(targets) if FAMILIES[family].unet else {})
    return tuple(Place(name, targets[name].out_rows, stride) for name, stride in layers.items())


def _encoder(targets: Mapping[str, Target]) -> dict[str, int]:
    """The last layer of each block of a U-Net's encoder and middle, in order, and its stride."""
    found = [match for name in targets if (match := re.fullmatch(r"down_blocks\.(\d+)\.resnets\.(\d+)\.conv2", name))]
    blocks = sorted((int(match[1]), int(match[2])) for match in found)
    names = {_last(f"down_blocks.{i}", j, targets): 2**i for i, j in blocks}
    middle = "mid_block.resnets.1.conv2"
    return names | ({middle: 2 ** blocks[-1][0]} if blocks and middle in targets else {})


def _last(level: str, block: int, targets: Mapping[str, Target]) -> str:
    attention = f"{level}.attentions.{block}.proj_out"
    return attention if attention in targets else f"{level}.resnets.{block}.conv2"


def entry_of(family: str, network: nn.Module) -> Target | None:
    """The layer by which a picture enters a network of either host, where it is a convolution of three dimensions,
    which no LoRA adapts."""
    name = FAMILIES[family].entry
    layer = dict(network.named_modules()).get(name)
    return Target(name, layer) if isinstance(layer, nn.Conv3d) else None


class ControlAdapter(nn.Module):
    """Told `control` [B, C, H, W] in [0, 1] by `Roles.use` and, if it likes, `strength`; told no control, it is not
    there. In a call of k times as many rows (guidance's two halves) each control serves k of them."""

    kind = "control"

    def __init__(self, config: ControlConfig) -> None:
        super().__init__()
        self.config = config
        self.before, self.after = frozenset[str](), frozenset(place.name for place in config.places)
        strides = sorted({place.stride for place in config.places})
        wide = {stride: config.width * min(stride, 4) for stride in strides}
        with torch.random.fork_rng(devices=[]):  # torch's layers draw their own start, which is not used
            enter = config.channels * config.cell**2 + config.latents
            self.enter = nn.Conv2d(enter, config.width, 3, padding=1)
            self.finer = nn.ModuleList(nn.Conv2d(wide[s // 2], wide[s], 3, 2, 1) for s in strides[1:])
            self.blocks = nn.ModuleList(nn.Sequential(*(Block(wide[s]) for _ in range(config.depth))) for s in strides)
            self.leave = nn.ModuleList(nn.Conv2d(wide[p.stride], p.channels, 1) for p in config.places)
        self._start(config.seed)

    @classmethod
    def from_config(cls, **config: Any) -> ControlAdapter:
        """Of the entries of `ControlConfig`, as a file's header tells them."""
        places = tuple(Place(**place) for place in config.pop("places"))
        return cls(ControlConfig(places=places, **config))

    @torch.no_grad()
    def _start(self, seed: int) -> None:
        """Every weight from (seed, name): normal, 1 / sqrt(fan in); the last layers and all biases zero."""
        for name, value in self.named_parameters():
            if value.ndim > 1 and not name.startswith("leave"):
                drawn = torch.randn(value.shape, generator=randomness.generator(seed, "control adapter", name))
                value.copy_(drawn / value[0].numel() ** 0.5)
            elif name.endswith("bias") or value.ndim > 1:
                value.zero_()

    def forward(self, control: Tensor, latents: Tensor | None = None) -> list[Tensor]:
        """The feature of each place, [B, channels, h / stride, w / stride], for ``control`` [B, C, H, W] and, where the
        adapter sees them, the network's ``latents`` [B, latents, h, w]; h = H / cell."""
        own = self.enter.weight
        cells = pixel_unshuffle(2 * control.to(own) - 1, self.config.cell)
        x = self.enter(cells if latents is None else torch.cat([cells, latents.to(own)], 1))
        levels = {}
        for at, blocks in enumerate(self.blocks):
            x = blocks(self.finer[at - 1](x) if at else x)
            levels[2**at] = x
        return [leave(levels[place.stride]) for leave, place in zip(self.leave, self.config.places, strict=True)]

    def on_input(self, name: str, x: Tensor, call: Call) -> Tensor:
        return x

    def on_output(self, name: str, x: Tensor, output: Tensor, call: Call) -> Tensor:
        control = call.inputs.get("control")
        if control is None:
            return output
        if output.ndim == 2:
            return self._in_one_row(name, x, output, call)
        if output.ndim == 5 and output.shape[1] == self.config.places[0].channels:  # [B, C, 1, h, w], as Wan's
            return self.on_output(name, of_one_frame(x), of_one_frame(output), call).unsqueeze(2)
        if output.ndim == 5:  # [B, 1, h, w, C] of a video's one frame; behind its latents Anima has a mask of padding
            x = x.flatten(1, 3)[..., : self.config.latents]
            return self.on_output(name, x, output.flatten(1, 3), call).view_as(output)
        if name == self.config.places[0].name:
            self._note(control, x, output, call)
        feature = float(call.inputs.get("strength", 1.0)) * call.cache[f"control {name}"]
        return output + (feature if output.ndim == 4 else tokens(feature)).to(output.dtype)

    def _in_one_row(self, name: str, x: Tensor, output: Tensor, call: Call) -> Tensor:
        """diffusers' Z-Image embeds the tokens of all pictures in one row, each of them filled up."""
        height, width = (side // self.config.cell for side in call.inputs["control"].shape[2:])
        filled = next(family.filled for family in FAMILIES.values() if family.entry == self.config.places[0].name)
        room = -(-height * width // filled) * filled
        if not room or len(output) % room:
            grid_of(self.config, call.inputs["control"], output[None])  # refuses this size
        x, output = (part.unflatten(0, (-1, room)) for part in (x, output))
        changed = self.on_output(name, x[:, : height * width], output[:, : height * width], call)
        return torch.cat([changed, output[:, height * width :]], 1).flatten(0, 1)

    def _note(self, control: Tensor, x: Tensor, output: Tensor, call: Call) -> None:
        """Encode the control at the network's entry, for all places of this call."""
        grid = grid_of(self.config, control, output)
        control = control.repeat(len(output) // len(control), 1, 1, 1)
        features = self(control, cells_of(x, grid) if self.config.latents else None)
        for place, feature in zip(self.config.places, features, strict=True):
            call.cache[f"control {place.name}"] = feature


class Block(nn.Module):
    """h + conv(silu(conv(silu(norm(h))))), and 1 / sqrt(2) of it, so that its size stays."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(next(g for g in (32, 16, 8, 4, 2, 1) if width % g == 0), width)
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        silu = nn.functional.silu
        return (h + self.second(silu(self.first(silu(self.norm(h)))))) / 2**0.5


def of_one_frame(latents: Tensor) -> Tensor:
    """Latents [B, C, 1, h, w] of a picture without their time. Raises OneStepError for a video's."""
    if latents.shape[2] != 1:
        raise OneStepError(
            f"the control is one of pictures, and this is a video of {latents.shape[2]} latent frames: draw one frame"
        )
    return latents.squeeze(2)


def tokens(picture: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h w, C], row by row, as both hosts' networks count."""
    return picture.flatten(2).transpose(1, 2)


def cells_of(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """What a network's first layer takes, [B, C, k h, k w] or tokens [B, h w, C], as cells [B, ., h, w]."""
    if x.ndim == 3:
        return x.transpose(1, 2).unflatten(2, grid)
    return pixel_unshuffle(x, x.shape[-1] // grid[1])


def grid_of(config: Any, control: Tensor, output: Tensor) -> tuple[int, int]:
    """(h, w) of the finest grid, which the control picture must cover. output: what the network's entry gives, or
    latents."""
    cell, channels = config.cell, config.channels
    if control.ndim != 4 or control.shape[1] != channels or len(output) % max(len(control), 1):
        raise OneStepError(
            f"the control picture is {list(control.shape)} for {len(output)} samples: a {config.control[:40]} "
            f"adapter takes [B, {channels}, H, W], one for each"
        )
    height, width = control.shape[2:]
    grid = height // cell, width // cell
    cells = tuple(output.shape[2:]) if output.ndim == 4 else (output.shape[1],)
    if height % cell or width % cell or cells not in (grid, (grid[0] * grid[1],)):
        wanted = "x".join(str(side * cell) for side in reversed(cells)) if len(cells) == 2 else "another size"
        raise OneStepError(
            f"the control picture is {width}x{height} pixels, the picture to draw {wanted}: resize it first"
        )
    return grid


def new_adapter(
    family: str,
    targets: Mapping[str, Target],
    control: tuple[str, int],
    size: tuple[int, int],
    shape: tuple[int, ...],
    *,
    width: int = 0,
    sees_latents: bool = True,
    seed: int = 0,
) -> ControlAdapter:
    """A new adapter for a network. control: (name, channels). size: (W, H) of a picture in pixels; shape: (C, h, w) of
    its latents. width: 0 = that of the network's first layer, 320 at most."""
    places = places_of(family, targets)
    patch = FAMILIES[family].patch
    cell = patch * (size[1] // shape[1])
    latents = shape[0] * patch**2 if sees_latents else 0
    width = width or min(places[0].channels, AUTOMATIC_WIDTH)
    return ControlAdapter(ControlConfig(*control, cell, latents, places, width, seed=seed))


def check_fit(adapter: Any, targets: Mapping[str, Target]) -> None:
    """Raises OneStepError where a layer that ``adapter`` acts on is missing, or of another width: another base's."""
    for place in adapter.config.places:
        found = targets[place.name].out_rows if place.name in targets else None
        if found != place.channels:
            what = "lacks" if found is None else f"has {found} channels in"
            raise OneStepError(
                f"the control adapter adds {place.channels} channels to {place.name[:80]}, this model {what} it: "
                "choose an adapter of its base"
            )


def fitted(control: Tensor, size: tuple[int, int]) -> Tensor:
    """A control picture [B, C, H, W] at ``size`` (width, height) in pixels: smoothed where it shrinks."""
    if control.shape[2:] == size[::-1]:
        return control
    return interpolate(control, size[::-1], mode="bilinear", antialias=True).clamp(0, 1)
