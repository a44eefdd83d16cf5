"""High-frequency promoting adaptation (HiPA, arXiv:2311.18158): regression on the teacher's pairs, with the detail of a
picture weighed for itself, as one step loses that first. Its spatial discriminator is not part of it here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...core.denoiser import Denoiser
from ..data.pairs import Pairs
from ..engine.batch import Batch
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.turns import Plan, on_data, one_phase
from ..settings import NoSettings, setting
from .method import Method
from .regression import Regression, pseudo_huber


@dataclass(frozen=True)
class HipaSettings(NoSettings):
    """What detail is, and what it weighs."""

    detail_weight: float = setting(1.0, "Weight of the error in high frequencies, beside that of the picture.", 0, 100)
    detail_from: float = setting(
        0.25, "Frequency from which on it is detail, as a share of the highest that the latents hold.", 0, 1
    )


def detail(x: Tensor, from_share: float) -> Tensor:
    """H(x) = F^-1(1[|f| >= f_0] F(x)) of latents [B, C, h, w]; |f| is the larger of both directions', 1 at the
    highest."""
    rows, columns = (2 * torch.fft.fftfreq(size, device=x.device).abs() for size in x.shape[-2:])
    high = torch.maximum(rows[:, None], columns[None]) >= from_share
    return torch.fft.ifft2(torch.fft.fft2(x.float() if x.dtype != torch.float64 else x) * high).real.to(x.dtype)


@dataclass(frozen=True)
class WithDetail:
    """regress: the picture's own term, which also says where the student looks."""

    regress: Regression
    weight: float
    from_share: float

    def __call__(self, denoise: Denoiser, batch: Batch, pairs: tuple[Tensor, Tensor]) -> Tensor:
        """d(G(z), x_T) + w d(H(G(z)), H(x_T)): a sum over a sample's elements, a mean over samples."""
        x0 = self.regress.answer(denoise, batch, pairs)
        own = pseudo_huber(x0, pairs[1], self.regress.c)
        high = pseudo_huber(detail(x0, self.from_share), detail(pairs[1], self.from_share), self.regress.c)
        return (own + self.weight * high).flatten(1).sum(1).mean()


def plan(setup: Setup) -> Plan:
    """The student's regression on the teacher's pairs, with detail."""
    own = setup.settings.own
    pairs = Pairs(setup.host, setup.prompts, setup.settings, setup.folder / "pairs")
    loss = WithDetail(Regression(setup.recipe), own.detail_weight, own.detail_from)
    turn = on_data(pairs.draw, partial(loss, setup.denoise), "regression")
    return one_phase(STUDENT, turn, setup.settings, pairs.blocks, pairs.solve_cost)


METHOD = Method(
    name="hipa",
    title="Regression that weighs detail for itself",
    paper="arXiv:2311.18158",
    forwards="2.6 + the pair",
    plan=plan,
    settings=HipaSettings,
)
