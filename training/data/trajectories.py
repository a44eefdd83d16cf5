"""Guided trajectories of the teacher: states along them, and what classifier-free guidance answers there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...core import randomness
from ...core.denoiser import as_host, both
from ...core.errors import OneStepError
from ...core.roles import TEACHER
from ...core.sampling import initial_latents, jump
from ...core.schedule import NoiseSchedule, expand, of_size
from ..engine.batch import Batch
from .pairs import Blocks, Sides

Start = Callable[[int, int], tuple[Tensor, float, float]]
SIDES = ("x", "target", "sigma", "apart", "w")


@dataclass(frozen=True)
class States:
    """B states of guided trajectories.

    x: [B, C, h, w] noisy latents. sigma: [B] their levels, float64. w: [B] each trajectory's guidance, float64.
    target: [B, C, h, w] D_u + w (D_c - D_u) there. apart: [B] |D_c - D_u| there.
    """

    x: Tensor
    sigma: Tensor
    w: Tensor
    target: Tensor
    apart: Tensor


@dataclass
class Trajectories(Blocks):
    """Samples of ``states`` states each, all of one prompt and on the levels of ``settings.teacher_steps``
    steps: of one trajectory after another, each from a noise and under a guidance of its own from ``scales``.

    A trajectory is left where guidance, |D_c - D_u|, has fallen below a random share of its largest: so a step is seen
    about as often as guidance is large there (the losses divide by that once, and what counts in the end is the square
    error of x0, which lies in the noisiest steps), and the first ones somewhat oftener, as each sample begins there. Of
    as many answers as there are steps, a sample keeps ``states`` by equal chances; where it is to keep more, it keeps
    every answer that it asks for.
    """

    scales: tuple[float, float]
    states: int
    stream = "trajectory"

    def draw(self, batch: Batch, update: int) -> tuple[Batch, States]:
        """Like ``batch``, of samples, at one state of each: never one where the teacher's answer is no number, while
        the sample has others."""
        share = randomness.uniform(batch.seed, "trajectory state", batch.step, batch.samples)

        def one_of_each(sides: Sides) -> Sides:
            at = torch.arange(len(share)), _chosen(sides[3].isfinite(), share)
            return tuple(side[at] for side in sides)

        drawn, (x, target, sigma, apart, w) = self._take(batch, update, one_of_each)
        return drawn, States(x, sigma, w, target, apart)

    def _make(self, block: int, micro: int) -> dict[str, Tensor]:
        parts = self._each(block, micro, partial(self._walk, block))
        joined = (torch.cat(sides) for sides in zip(*parts, strict=True))
        return dict(zip(SIDES, joined, strict=True))

    def _sides(self, block: int, kept: dict[str, Tensor]) -> Sides:
        if "w" not in kept:
            raise OneStepError(
                f"the trajectories in {self.folder} are of an earlier version, which kept no guidance for each state: "
                "restart the run"
            )
        return tuple(kept[name] for name in SIDES)

    @torch.no_grad()
    def _walk(self, block: int, rows: list[int], batch: Batch) -> tuple[Tensor, ...]:
        """(x, target, sigma, apart, w), [B, states, ...] each, on the CPU."""
        denoise, null, settings = self.host.denoiser, batch.nulls(), self.settings
        assert null is not None  # the method's check has seen to that
        start, length = partial(self._start, block), max(settings.teacher_steps, self.states)
        schedule = of_size(denoise.schedule, self.prompts.shapes[self._size(block)])
        walkers, seen = Walkers(schedule, settings.teacher_steps, start, rows, batch.device), []
        with denoise.roles.use(TEACHER):
            for _ in range(length):
                x, sigma, w = walkers.x, walkers.sigma, walkers.w.clone()
                d_c, d_u = both(denoise, x, sigma, batch.cond, null)
                target = as_host(denoise.token_norm, x, d_c, d_u + expand(w, x) * (d_c - d_u))
                apart = (d_c - d_u).flatten(1).norm(dim=1)
                seen.append([side.cpu() for side in (x, target, sigma, apart, w)])
                walkers.step(target, seen[-1][3])
        keeps = torch.stack([self._keeps(block, row, length) for row in rows])
        sides = (torch.stack(side, 1)[keeps] for side in zip(*seen, strict=True))
        return tuple(side.unflatten(0, (len(rows), self.states)) for side in sides)

    def _keeps(self, block: int, row: int, length: int) -> Tensor:
        """[length]: whether a sample keeps each of the answers it asks for; it keeps ``states``."""
        draw = randomness.generator(self.settings.seed, "trajectory states", block, row)
        return torch.randperm(length, generator=draw) < self.states

    def _start(self, block: int, row: int, number: int) -> tuple[Tensor, float, float]:
        """Unit noise [C, h, w], guidance and the share at which it is left, of a row's trajectory ``number``."""
        draw = randomness.generator(self.settings.seed, "trajectory", block, row, number)
        noise = torch.randn(*self.prompts.shapes[self._size(block)], generator=draw)
        place, share = torch.rand(2, dtype=torch.float64, generator=draw).tolist()
        low, high = self.scales
        return noise, low + (high - low) * place, share


class Walkers:
    """B trajectories under way, one for each of ``rows``; where one is left, the row's next begins.

    x: [B, C, h, w] states on ``device``. w: [B] guidances, float64. ``start`` (row, number) gives a trajectory's unit
    noise, guidance and share.
    """

    def __init__(
        self, schedule: NoiseSchedule, steps: int, start: Start, rows: Sequence[int], device: torch.device
    ) -> None:
        self._schedule, self._start, self._rows = schedule, start, rows
        self._levels = schedule.sigma_of_time(schedule.trailing(steps))
        self._begun, self._at = [0] * len(rows), torch.zeros(len(rows), dtype=torch.long)
        self.w, self._share, self._most = torch.zeros(3, len(rows), dtype=torch.float64)
        self.x = torch.stack([self._begin(place) for place in range(len(rows))]).to(device)

    @property
    def sigma(self) -> Tensor:
        """[B], float64."""
        return self._levels[self._at]

    def step(self, x0: Tensor, apart: Tensor) -> None:
        """Each on to its next level, for the guided answers x0 [B, ...]; left where guidance, ``apart`` [B], is below
        its share of the largest so far, or no number, and at the last level."""
        self._most = torch.maximum(self._most, apart.double())
        strong = apart.isfinite() & (apart >= self._share * self._most)
        goes = strong & (self._at + 1 < len(self._levels))
        lower = self._at + goes.long()
        self.x, self._at = jump(self._schedule, self.x, x0, self.sigma, self._levels[lower]), lower
        for place in (~goes).nonzero().flatten().tolist():
            self.x[place] = self._begin(place).to(self.x)

    def _begin(self, place: int) -> Tensor:
        """The next trajectory's first state, [C, h, w]."""
        noise, self.w[place], self._share[place] = self._start(self._rows[place], self._begun[place])
        self._begun[place] += 1
        self._at[place], self._most[place] = 0, 0.0
        return initial_latents(self._schedule, noise[None], self._levels[:1], 1.0)[0]


def _chosen(good: Tensor, share: Tensor) -> Tensor:
    """[B]: of the places that are ``good`` [B, N], or of all where none is, the one at ``share`` [B] in [0, 1)."""
    good = good | ~good.any(1, keepdim=True)
    place = (share * good.sum(1)).floor()
    return (good.cumsum(1) > place[:, None]).int().argmax(1)
