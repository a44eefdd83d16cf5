"""What a network gives at some of its blocks while it answers, as pictures [B, channels, rows, columns].

Blocks are known by the canonical names of the layers in them, so that both hosts are looked at in the same places.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .errors import OneStepError
from .families import block_of
from .families.family import Block
from .role_map import RoleMap
from .targets import Target

_UNET = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions)\.(\d+)(?:\.transformer_blocks\.(\d+))?\."
)
_DIT = re.compile(r"(single_)?(?:transformer_blocks|layers|blocks)\.(\d+)\.")


class Features:
    """``count`` of ``blocks``, or all where there are fewer, spread over a U-Net's encoder and middle, or over a
    transformer: one is the middle of either. targets: the adapted layers, by which blocks are named. active: the role
    map of a running call, which knows its rows where texts of several lengths are calls of their own. Raises
    OneStepError where there are no blocks."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        blocks: Iterable[nn.Module],
        count: int,
        active: Callable[[], RoleMap] = RoleMap,
    ) -> None:
        found = {name: block for name, block in in_order(targets, blocks).items() if not name.startswith("up_blocks")}
        if not found:
            raise OneStepError(
                "this base has no blocks with adapted layers that a discriminator's head could look at: choose a "
                "method without a head"
            )
        self.names = [list(found)[place] for place in _spread(list(found), min(count, len(found)))]
        self._blocks, self._active = [found[name] for name in self.names], active

    @contextmanager
    def kept(self, latents: Tensor) -> Iterator[list[Tensor]]:
        """Within, one call of the denoiser about ``latents`` [B, C, h, w]; after it its features are there, one a
        block."""
        # a copy: ComfyUI's Flux writes what the next block adds into the same memory
        with seen(self._blocks, latents, torch.clone, self._active) as found:
            yield found


class Deviations:
    """How much each channel of each block of a U-Net or a transformer varies over the picture. targets, active: as of
    `Features`. None of them where no block has adapted layers."""

    def __init__(
        self, targets: Mapping[str, Target], blocks: Iterable[nn.Module], active: Callable[[], RoleMap] = RoleMap
    ) -> None:
        self._blocks, self._active = list(in_order(targets, blocks).values()), active

    def __len__(self) -> int:
        return len(self._blocks)

    @contextmanager
    def kept(self, latents: Tensor) -> Iterator[list[Tensor]]:
        """Within, one call of the denoiser about ``latents`` [B, C, h, w]; after it [B, channels] of each block."""
        with seen(self._blocks, latents, _deviation, self._active) as found:
            yield found


def _deviation(picture: Tensor) -> Tensor:
    return picture.flatten(2).float().std(2, correction=0)


@contextmanager
def seen(
    blocks: Sequence[nn.Module], latents: Tensor, read: Callable[[Tensor], Tensor], active: Callable[[], RoleMap]
) -> Iterator[list[Tensor]]:
    """Within, one call of a denoiser about ``latents``; after it what ``read`` made of each block's picture [B,
    channels, rows, columns]."""
    kept: list[list[Tensor]] = [[] for _ in blocks]
    rows: list[int] = []
    found: list[Tensor] = []

    def keep(place: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept[place].append(read(as_picture(block_of(block), output, latents.shape[-2:])))
        if place == 0:
            rows.extend(active().rows)

    handles = [block.register_forward_hook(partial(keep, place)) for place, block in enumerate(blocks)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    found.extend(_in_rows(parts, rows) for parts in kept if parts)


def _in_rows(parts: list[Tensor], rows: list[int]) -> Tensor:
    """The rows of all calls in the order of the whole. rows: which they are; none of a single call."""
    if not rows:
        return parts[-1]
    together = torch.cat(parts)
    return together[torch.tensor(rows, device=together.device).argsort()]


def as_picture(block: Block, output: Any, size: Sequence[int]) -> Tensor:
    """[B, channels, rows, columns] of what ``block`` gives for latents of ``size`` (h, w)."""
    value = output[block.picture] if isinstance(output, tuple | list) else output
    if value.ndim == 5:  # [B, 1, rows, columns, channels] of a video's one frame
        return value[:, 0].movedim(-1, 1)  # type: ignore[no-any-return]
    if value.ndim == 4:
        return value  # type: ignore[no-any-return]
    rows, columns = _cells(size, block.patch) if block.sequence else _grid(value.shape[1], size)
    room = -(-rows * columns // block.filled) * block.filled
    value = value[:, :room] if block.sequence == "picture first" else value[:, -room:]
    return value[:, : rows * columns].transpose(1, 2).unflatten(2, (rows, columns))  # type: ignore[no-any-return]


def _cells(size: Sequence[int], stride: int) -> tuple[int, int]:
    return math.ceil(size[0] / stride), math.ceil(size[1] / stride)


def _grid(tokens: int, size: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a picture's tokens, each of a square of 1, 2, 4, ... latents."""
    for power in range(max(size).bit_length() + 1):
        rows, columns = _cells(size, 2**power)
        if rows * columns == tokens:
            return rows, columns
    raise OneStepError(
        f"a block of this base gives {tokens} tokens for latents of {tuple(size)}, which are no picture's: choose "
        "another base, or watch_every=0 and a method without a head"
    )


def in_order(targets: Mapping[str, Target], blocks: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """The blocks that can be looked at by canonical name, in the order in which the network comes to them."""
    owners = {layer: block for block in blocks for layer in block.modules()}
    found: dict[nn.Module, tuple[tuple[int, ...], str]] = {}
    for name, target in targets.items():
        place, block = _place(name), owners.get(target.module)
        if place is not None and block is not None:
            found[block] = min(place, found.get(block, place))
    return {name: block for block, (_, name) in sorted(found.items(), key=lambda entry: entry[1])}


def _place(name: str) -> tuple[tuple[int, ...], str] | None:
    """(the place of the block that holds the layer ``name`` among the others, its name)."""
    unet, dit = _UNET.match(name), _DIT.match(name)
    if unet is not None:
        half, level, kind, index, inner = unet.groups()
        # a level is a residual block, then its attention, then the next residual block
        first = 10**6 if half is None else int(level) + 2 * 10**6 * (half == "up")
        order = (first, 2 * int(index) + (kind == "attentions"), int(inner or 0))
        return order, unet[0].rstrip(".")
    return None if dit is None else ((bool(dit[1]), int(dit[2])), dit[0].rstrip("."))


def _spread(names: Sequence[str], count: int) -> list[int]:
    """Places of ``count`` names: the last of equal parts of a U-Net's, the middles of equal parts of a
    transformer's."""
    at = 1.0 if names[0].startswith(("down_blocks", "mid_block")) else 0.5
    return [math.ceil((part + at) * len(names) / count) - 1 for part in range(count)]
