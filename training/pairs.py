"""Teacher pairs (z, x_T): the ends of the teacher's ODE, made as they are first needed, kept on disk up to a cap."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..core import randomness
from ..core.roles import TEACHER
from ..core.sampling import teacher_sample
from ..core.tensor_file import read_tensors, write_tensors
from .batch import Batch
from .host import Host
from .prompts import Prompts, Size
from .settings import Settings

KEPT_BYTES = 2**29
"""Of pairs in host memory; the others are read from the disk again."""


@dataclass
class Pairs:
    """Blocks of ``settings.batch`` pairs, one size each. A pair is a function of (seed, block, row), whoever asks
    for it."""

    host: Host
    prompts: Prompts
    settings: Settings
    folder: Path

    def __post_init__(self) -> None:
        wanted = -(-self.settings.pairs // self.settings.batch)
        self.blocks = max(wanted, len(self.prompts.sizes))
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def draw(self, batch: Batch, update: int) -> tuple[Batch, tuple[Tensor, Tensor]]:
        """Like ``batch``, of pairs: each once in order while there are new ones, then any of its size at random."""
        block = update if update < self.blocks else None
        size = self._size(update if block is not None else batch.choice(self.blocks, "pair size"))
        blocks = [self._any(batch, size, row) if block is None else block for row in range(len(batch))]
        rows = list(batch.samples) if block is not None else self._rows(batch)
        ends = [tuple(side[row] for side in self._block(at, len(batch))) for at, row in zip(blocks, rows, strict=True)]
        noise, target = (torch.stack(side).to(batch.device) for side in zip(*ends, strict=True))
        chosen = torch.stack([self._prompt(at, row) for at, row in zip(blocks, rows, strict=True)])
        return self.prompts.of(size, chosen, batch.step, batch.samples), (noise, target)

    def _size(self, block: int) -> Size:
        return self.prompts.sizes[block % len(self.prompts.sizes)]

    def _any(self, batch: Batch, size: Size, row: int) -> int:
        first, every = self.prompts.sizes.index(size), len(self.prompts.sizes)
        count = -(-(self.blocks - first) // every)
        sample = [batch.samples[row]]
        return first + every * int(randomness.integers(count, batch.seed, "pair block", batch.step, sample)[0])

    def _rows(self, batch: Batch) -> list[int]:
        return randomness.integers(self.settings.batch, batch.seed, "pair row", batch.step, batch.samples).tolist()

    def _prompt(self, block: int, row: int) -> Tensor:
        return randomness.integers(len(self.prompts), self.settings.seed, "pair prompt", block, [row])[0]

    def _block(self, block: int, micro: int) -> tuple[Tensor, Tensor]:
        """(z, x_T) of a block, [batch, C, h, w] each, on the CPU; made in slices of ``micro`` where it is new."""
        if block not in self._kept:
            path = self.folder / f"{block:06d}.safetensors"
            if not path.is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_tensors(path, {"x": self._solve(block, micro)})
            self._kept[block] = self._noise(block), read_tensors(path)["x"]
        pair = self._kept[block]
        if len(self._kept) * 2 * pair[0].nbytes > KEPT_BYTES:
            del self._kept[next(iter(self._kept))]
        return pair

    def _noise(self, block: int) -> Tensor:
        shape = self.prompts.shapes[self._size(block)]
        return randomness.normal(shape, self.settings.seed, "pair noise", block, range(self.settings.batch))

    def _solve(self, block: int, micro: int) -> Tensor:
        """x_T of a block, in slices of ``micro`` samples."""
        noise, size = self._noise(block), self._size(block)
        ends = []
        for rows in torch.arange(self.settings.batch).split(micro):
            self.host.poll()
            chosen = torch.stack([self._prompt(block, row) for row in rows.tolist()])
            batch = self.prompts.of(size, chosen, block, rows.tolist())
            ends.append(teach(self.host, self.settings, batch, noise[rows].to(batch.device)).cpu())
        return torch.cat(ends)


@torch.no_grad()
def teach(host: Host, settings: Settings, batch: Batch, noise: Tensor) -> Tensor:
    """The teacher's own pictures [B, C, h, w] for ``batch``, from ``noise``, at the run's teacher steps and
    guidance."""
    guidance = settings.guidance if host.denoiser.guidance == "cfg" else 1.0
    with host.denoiser.roles.use(TEACHER):
        return teacher_sample(host.denoiser, batch.cond, batch.nulls(), noise, settings.teacher_steps, guidance)
