"""What a teacher made, kept on disk up to a cap; and pairs (z, x_T), the ends of its ODE, the first kind of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from ...core import randomness
from ...core.memory import Slices
from ...core.roles import TEACHER
from ...core.sampling import fewer, teacher_sample
from ...core.sending import sent
from ...core.tensor_file import read_tensors, write_tensors
from ..engine import processes
from ..engine.batch import Batch
from ..engine.making import making
from ..engine.prompts import Prompts, Size
from ..host import Host
from ..settings import Settings

MADE = "teacher's data"
"""What a profile of a run calls the making of it."""
Made = TypeVar("Made")
Sides = tuple[Tensor, ...]
"""What is handed out of some samples, [B, ...] each."""
FEWEST = 8
"""Teacher's steps from which on fewer of second order take their place."""
KEPT_BYTES = 2**29
"""Of each kind in host memory; the others are read from the disk again."""


@dataclass
class Blocks:
    """Blocks of ``settings.batch`` samples, one size and one group of prompts each, made as they are first needed. A
    sample is a function of (seed, block, row), whoever asks for it; `stream` names the numbers that a kind draws for
    itself."""

    host: Host
    prompts: Prompts
    settings: Settings
    folder: Path
    stream: ClassVar[str]

    def __post_init__(self) -> None:
        wanted = -(-self.settings.pairs // self.settings.batch)
        self._groups = max(1, len(self.prompts.groups))
        self.blocks = max(wanted, len(self.prompts.sizes) * self._groups)
        self._kept: dict[int, Sides] = {}
        self._room = Slices(self.settings.batch, "the teacher's pictures")
        self._agreed, self._missing = -1, False

    def _make(self, block: int, micro: int) -> dict[str, Tensor]:
        """What of a block is kept on disk, [batch, ...] each, on the CPU; made in slices of ``micro`` samples."""
        raise NotImplementedError

    def _sides(self, block: int, kept: dict[str, Tensor]) -> Sides:
        """What of a block is handed out, [batch, ...] each."""
        raise NotImplementedError

    @property
    def solve_cost(self) -> float:
        """Network forwards that one sample's trajectory of the teacher takes."""
        guided = self.host.denoiser.guidance == "cfg" and self.settings.guidance != 1
        return evaluations(self.settings) * (2.0 if guided else 1.0)

    def every(self, micro: int) -> Iterator[Sides]:
        """What of each block is handed out, in order; made in slices of ``micro`` samples."""
        return (self._block(block, micro) for block in range(self.blocks))

    def _take(
        self, batch: Batch, update: int, choose: Callable[[Sides], Sides] = lambda sides: sides
    ) -> tuple[Batch, Sides]:
        """Like ``batch``, of samples made: each once in order while there are new ones, then any of its size. choose:
        what of their sides is wanted, while they are in the host's memory."""
        block = update if update < self.blocks else None
        if block is not None:
            self._made_by_all(block, len(batch))
        like = update if block is not None else batch.choice(self.blocks, f"{self.stream} size")
        # the update says the group
        like += update % self._groups - like % self._groups
        size = self._size(like)
        blocks = [self._any(batch, like, row) if block is None else block for row in range(len(batch))]
        rows = list(batch.samples) if block is not None else self._rows(batch)
        ends = [tuple(side[row] for side in self._block(at, len(batch))) for at, row in zip(blocks, rows, strict=True)]
        sides = choose(tuple(torch.stack(side) for side in zip(*ends, strict=True)))
        sides = tuple(_placed(side, batch.device) for side in sides)
        chosen = torch.stack([self._prompt(at, row) for at, row in zip(blocks, rows, strict=True)])
        return self.prompts.of(size, chosen, batch.step, batch.samples), sides

    def _size(self, block: int) -> Size:
        return self.prompts.sizes[block // self._groups % len(self.prompts.sizes)]

    def _any(self, batch: Batch, like: int, row: int) -> int:
        """A block of the size and the group of the block ``like``."""
        every = self._groups * len(self.prompts.sizes)
        first = like % every
        count = -(-(self.blocks - first) // every)
        sample = [batch.samples[row]]
        return first + every * int(
            randomness.integers(count, batch.seed, f"{self.stream} block", batch.step, sample)[0]
        )

    def _rows(self, batch: Batch) -> list[int]:
        stream = f"{self.stream} row"
        return randomness.integers(self.settings.batch, batch.seed, stream, batch.step, batch.samples).tolist()

    def _prompt(self, block: int, row: int) -> Tensor:
        group = self.prompts.groups[block % self._groups] if self.prompts.groups else None
        many = len(self.prompts if group is None else group)
        drawn = randomness.integers(many, self.settings.seed, f"{self.stream} prompt", block, [row])[0]
        return drawn if group is None else group[drawn]

    def _block(self, block: int, micro: int) -> Sides:
        if block not in self._kept:
            path = self._path(block)
            if not path.is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                with record_function(MADE), making():
                    write_tensors(path, self._make(block, micro))
            self._kept[block] = self._sides(block, read_tensors(path))
        sides = self._kept[block]
        if len(self._kept) * sum(side.nbytes for side in sides) > KEPT_BYTES:
            del self._kept[next(iter(self._kept))]
        return sides

    def _made_by_all(self, block: int, micro: int) -> None:
        """Several processes make the blocks from ``block`` on, one each, before they all go on with it. They meet once
        a block: one of them may have more micro-batches of it than another, or begin it again where memory ran out."""
        if processes.count() == 1:
            return
        if block != self._agreed:
            self._agreed, self._missing = block, not processes.same(self._path(block).is_file())
        if not self._missing:
            return
        own = block + processes.rank()
        if own < self.blocks:
            self._block(own, micro)
        processes.wait()
        self._missing = False

    def _path(self, block: int) -> Path:
        return self.folder / f"{block:06d}.safetensors"

    def _noise(self, block: int) -> Tensor:
        shape, stream = self.prompts.shapes[self._size(block)], f"{self.stream} noise"
        return randomness.normal(shape, self.settings.seed, stream, block, range(self.settings.batch))

    def _each(self, block: int, micro: int, make: Callable[[list[int], Batch], Made]) -> list[Made]:
        """``make`` of the rows of each slice of a block and their prompts: at most ``micro`` samples, and fewer where
        memory has run out."""

        def polled(rows: list[int]) -> Made:
            self.host.poll()
            return make(rows, self._rows_of(block, rows))

        self._room.size = min(micro, self._room.size)
        return self._room(range(self.settings.batch), polled)

    def _rows_of(self, block: int, rows: list[int]) -> Batch:
        """A block's samples at ``rows``."""
        chosen = torch.stack([self._prompt(block, row) for row in rows])
        return self.prompts.of(self._size(block), chosen, block, rows)


def _placed(side: Tensor, device: torch.device) -> Tensor:
    """Latents and pictures where the network is; levels, scales and indices of samples stay on the CPU, where levels
    live."""
    return sent(side, device) if side.ndim > 2 else side


@dataclass
class Pairs(Blocks):
    """(z, x_T): unit noise, and the end of the teacher's ODE from it."""

    stream = "pair"

    def draw(self, batch: Batch, update: int) -> tuple[Batch, tuple[Tensor, Tensor]]:
        """Like ``batch``, of pairs, [B, C, h, w] each."""
        batch, (noise, target) = self._take(batch, update)
        return batch, (noise, target)

    def _make(self, block: int, micro: int) -> dict[str, Tensor]:
        return {"x": self._solve(block, micro)}

    def _sides(self, block: int, kept: dict[str, Tensor]) -> Sides:
        return self._noise(block), kept["x"]

    def _solve(self, block: int, micro: int) -> Tensor:
        """x_T of a block, in slices of ``micro`` samples."""
        noise = self._noise(block)

        def end(rows: list[int], batch: Batch) -> Tensor:
            return teach(self.host, self.settings, batch, noise[rows].to(batch.device)).cpu()

        return torch.cat(self._each(block, micro, end))


@torch.no_grad()
def teach(host: Host, settings: Settings, batch: Batch, noise: Tensor) -> Tensor:
    """The teacher's own pictures [B, C, h, w] for ``batch``, from ``noise``, at the run's teacher steps and
    guidance."""
    guidance = settings.guidance if host.denoiser.guidance == "cfg" else 1.0
    with host.denoiser.roles.use(TEACHER):
        return teacher_sample(
            *(host.denoiser, batch.of_teacher, batch.nulls(), noise, settings.teacher_steps, guidance),
            second_order=of_second_order(settings),
        )


def evaluations(settings: Settings) -> int:
    """Steps in which a picture of the teacher is drawn."""
    return fewer(settings.teacher_steps) if of_second_order(settings) else settings.teacher_steps


def of_second_order(settings: Settings) -> bool:
    """Whether the teacher's pictures are drawn so: where there are enough steps for an order to show."""
    return settings.second_order and settings.teacher_steps >= FEWEST
