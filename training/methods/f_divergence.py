r"""Weights of f-divergences (f-distill, arXiv:2502.15681): the matching's gradient, by the ratio of the densities.

    d D_f(p || q) = E_q[h(r) (grad log q - grad log p) dx],   h(r) = r^2 f''(r),   r = p(x_s) / q(x_s)      (Theorem 1)

p is the teacher's density at a noise level, q the student's; log r is a discriminator's logit at its best. A few
samples of large r would be all that is learnt from, so r is brought to mean 1 within each tenth of the noise levels,
and h to mean 1 over all. The paper takes both means over a batch of 2,048; here they run over the updates, of the
student's pictures that the head has just learnt from, so that neither the batch's size nor its micro-batches matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ...core.schedule import NoiseSchedule, cast_as
from ...core.sending import sent
from ..engine import processes
from ..engine.batch import Batch

Weigh = Callable[[Tensor], Tensor]
"""r [B] -> h [B]."""
WEIGHTS: dict[str, Weigh] = {
    # f = -log r: every sample weighs the same, and it is dmd2
    "reverse-kl": torch.ones_like,
    # f = r log r
    "kl": lambda r: r,
    # f = r log r - (r + 1) log((r + 1) / 2)
    "jensen-shannon": lambda r: r / (1 + r),
    # f = (r + 1) log(1/2 + 1 / (2 r))
    "softened-reverse-kl": lambda r: 1 / (1 + r),
    # f = (1 - r)^2 / r, halved
    "neyman": lambda r: 1 / r,
    # f = (1 - sqrt r)^2, doubled
    "squared-hellinger": torch.sqrt,
    # f = (r - 1) log r
    "jeffreys": lambda r: 1 + r,
}
"""h by the divergence's name, from the one that seeks single modes on; a constant factor falls out with the mean."""
BINS = 10


class Ratios(nn.Module):
    """h of samples, and the means that it is brought to: parameters that no gradient moves, kept with the head's.

    low, high: bounds of r. memory: share of a mean that an update keeps.
    """

    def __init__(
        self, divergence: str, low: float, high: float, memory: float, weights: Mapping[str, Weigh] = WEIGHTS
    ) -> None:
        super().__init__()
        self.h, self.low, self.high, self.memory = weights[divergence], low, high, memory
        self.ratio = nn.Parameter(torch.ones(BINS), requires_grad=False)
        self.weight = nn.Parameter(self.h(torch.ones(1)), requires_grad=False)
        self._noted: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, schedule: NoiseSchedule, sigma: Tensor, logit: Tensor) -> Tensor:
        """h(r / E[r | level]) / E[h] [B] for samples at sigma [B] with ``logit`` [B]."""
        return self.h(self.scaled(schedule, sigma, logit)) / self.weight

    def scaled(self, schedule: NoiseSchedule, sigma: Tensor, logit: Tensor) -> Tensor:
        """r / E[r | level] [B]."""
        return self.clamped(logit) / self.ratio[sent(_bin(schedule, sigma), logit.device)]

    def clamped(self, logit: Tensor) -> Tensor:
        """r [B] within its bounds."""
        return torch.exp(logit.detach().float().clamp(-10, 10)).clamp(self.low, self.high)

    def note(self, schedule: NoiseSchedule, batch: Batch, sigma: Tensor, logit: Tensor) -> None:
        """Pictures of the student, of one micro-batch: their levels [B] and logits [B]. What is done again, as memory
        has run out, is noted once."""
        for key in [key for key in self._noted if key[0] != batch.step]:
            del self._noted[key]
        places, ratios = _bin(schedule, sigma), self.clamped(logit)
        self._noted |= {(batch.step, row): (places[at], ratios[at]) for at, row in enumerate(batch.samples)}

    @torch.no_grad()
    def settle(self) -> None:
        """The means move towards those of what was noted, in all processes alike."""
        noted = [self._noted[key] for key in sorted(self._noted)]
        self._noted.clear()
        places, ratios = map(torch.stack, zip(*noted, strict=True))
        # a card is waited for once
        ratios, mean = torch.cat([ratios, self.ratio]).cpu().double().split([len(ratios), BINS])
        sums, counts = (torch.zeros(BINS, dtype=torch.float64) for _ in range(2))
        sums.index_add_(0, places, ratios)
        counts.index_add_(0, places, torch.ones_like(ratios))
        sums, counts = _of_all(sums), _of_all(counts)
        # E[r | level] <- m E[r | level] + (1 - m) mean r, of levels that were looked at
        mean = mean + torch.where(counts > 0, (1 - self.memory) * (sums / counts.clamp_min(1) - mean), 0.0)
        self.ratio.copy_(cast_as(mean, self.ratio))
        # E[h] <- m E[h] + (1 - m) mean h
        h = _of_all(torch.stack([self.h(ratios / mean[places]).sum()])) / counts.sum()
        self.weight.add_((1 - self.memory) * (cast_as(h, self.weight) - self.weight))


def _bin(schedule: NoiseSchedule, sigma: Tensor) -> Tensor:
    """[B]: which of `BINS` equal parts of the model's time."""
    return (BINS * schedule.share_of(sigma)).long().clamp(0, BINS - 1)


def _of_all(values: Tensor) -> Tensor:
    """The sum of all processes' ``values`` [n], on the CPU."""
    summed = processes.sum_numbers({str(at): value for at, value in enumerate(values.tolist())})
    return torch.tensor([summed[str(at)] for at in range(len(values))], dtype=torch.float64)
