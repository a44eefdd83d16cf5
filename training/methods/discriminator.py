r"""A discriminator head on the frozen base's features: a small module beside it, not a second network.

    L_H = E[l_real(H(x_s))] + E[l_fake(H(G(z)_s))] + lambda |H(x_s) - H((x + s n)_s)|^2,   x_s = alpha x + sigma noise
    L_G = E[l_G(H(G(z)_s))]

l is the non-saturating loss (DMD2, arXiv:2405.14867, section 4.3) or the hinge (LADD, arXiv:2403.12015, section 3); the
last term is the approximate R1 penalty of APT (arXiv:2501.08316). H reads what the base, without an adapter, gives at
some of its blocks when it is asked for x_s; what is real are the teacher's own pictures. At its best
H = log p_real(x_s) - log p_fake(x_s) (arXiv:1406.2661, Prop. 1, by the non-saturating loss).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, relu, softplus

from ...core import randomness
from ...core.cond import Cond
from ...core.denoiser import Denoiser
from ...core.features import Features
from ...core.roles import TEACHER
from ...core.schedule import NoiseSchedule, add_noise
from ..engine.batch import Batch
from ..engine.levels import LevelSampler, UniformTime

HEAD = "head"
"""The role whose module the head is: it learns and is saved as one, and serves no call."""
Logits = Sequence[Tensor]
"""[B, n] of each block that is looked at: one for the whole picture, or one for each of its cells."""


class Head(nn.Module):
    """H. channels: of each feature. cells: a logit for each cell of a feature (LADD) instead of one for all of it.

    For each feature a convolution of stride 2, group norm, a leaky ReLU and a 1x1 convolution, which is 0 at the start:
    a new head cannot tell what is real.
    """

    def __init__(self, channels: Sequence[int], width: int, cells: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.before, self.after = frozenset[str](), frozenset[str]()  # of the network's layers it changes none
        self.cells = cells
        with torch.random.fork_rng(devices=[]):  # torch's layers draw their own start, which is not used
            self.enter = nn.ModuleList(nn.Conv2d(count, width, 3, 2, 1) for count in channels)
            self.norm = nn.ModuleList(nn.GroupNorm(_groups(width), width) for _ in channels)
            self.leave = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in channels)
        self._start(seed)

    @torch.no_grad()
    def _start(self, seed: int) -> None:
        """The first convolutions from (seed, name): normal, 1 / sqrt(fan in); what is behind the norms 0."""
        for name, value in self.named_parameters():
            if name.startswith("enter") and value.ndim > 1:
                drawn = torch.randn(value.shape, generator=randomness.generator(seed, "head", name))
                value.copy_(drawn / value[0].numel() ** 0.5)
            elif not name.startswith("norm"):
                value.zero_()

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """[B, n] of each of ``features`` [B, channels, rows, columns], in float32."""
        like, parts = next(self.parameters()), zip(features, self.enter, self.norm, self.leave, strict=True)
        maps = [leave(leaky_relu(norm(enter(value.to(like))), 0.2)).flatten(1) for value, enter, norm, leave in parts]
        return maps if self.cells else [logits.mean(1, keepdim=True) for logits in maps]


def _groups(width: int) -> int:
    """At most 32, of eight channels or more: where a feature is one cell, a group of one channel would norm all of it
    away."""
    return next(count for count in range(max(1, min(32, width // 8)), 0, -1) if width % count == 0)


@dataclass(frozen=True)
class GanLoss:
    """Of single logits. real, fake: the head's. generator: the student's."""

    real: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


LOSSES = {
    # -log sigmoid(H), -log(1 - sigmoid(H)); the student's -log sigmoid(H)
    "softplus": GanLoss(real=lambda h: softplus(-h), fake=softplus, generator=lambda h: softplus(-h)),
    # max(0, 1 - H), max(0, 1 + H); the student's -H
    "hinge": GanLoss(real=lambda h: relu(1 - h), fake=lambda h: relu(1 + h), generator=lambda h: -h),
}


@dataclass(frozen=True)
class Discriminator:
    """head: H. features: what it reads. penalty, spread: lambda and s of the approximate R1 penalty. note: is told of
    the student's pictures that the head learns from: their batch, levels [B] and logits [B]."""

    head: Callable[[Sequence[Tensor]], Logits]
    features: Features
    loss: GanLoss = LOSSES["softplus"]
    levels: LevelSampler = UniformTime()
    penalty: float = 0.0
    spread: float = 0.1
    note: Callable[[NoiseSchedule, Batch, Tensor, Tensor], None] | None = None

    @property
    def forwards(self) -> int:
        """Of one sample in the head's loss."""
        return 3 if self.penalty else 2

    # -- the head -----------------------------------------------------------------------------------------------------

    def head_loss(
        self, denoise: Denoiser, batch: Batch, real: Tensor, fake: Tensor
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """L_H, a mean over samples, and numbers of it; real, fake: pictures [B, ...] of ``batch``'s conditions, each
        with noise of its own at the sample's level."""
        schedule, noise = denoise.schedule, batch.normal("head real noise")
        sigma = self.levels(schedule, batch.uniform("head level"))
        asked = [
            add_noise(schedule, real, noise, sigma),
            add_noise(schedule, fake.detach(), batch.normal("head fake noise"), sigma),
        ]
        if self.penalty:
            moved = real + self.spread * batch.normal("head penalty noise")
            asked.append(add_noise(schedule, moved, noise, sigma))
        with torch.no_grad():
            seen = self._seen_together(denoise, batch, asked, sigma)
        h_real, h_fake, *h_moved = (self.head(features) for features in seen)
        if self.note is not None:
            self.note(schedule, batch, sigma, averaged(_itself, h_fake))
        loss = averaged(self.loss.real, h_real) + averaged(self.loss.fake, h_fake)
        numbers = {"head_real": averaged(_itself, h_real), "head_fake": averaged(_itself, h_fake)}
        for moved_logits in h_moved:
            pairs = zip(h_real, moved_logits, strict=True)
            loss = loss + self.penalty * averaged(torch.square, [one - other for one, other in pairs])
        told = {name: value.detach().mean() for name, value in {"head": loss, **numbers}.items()}
        return loss.mean(), told

    def _seen_together(self, denoise: Denoiser, batch: Batch, asked: list[Tensor], sigma: Tensor) -> list[list[Tensor]]:
        """The features of each of ``asked``, from one forward; or, of a sliced batch, from a forward for each."""
        if batch.sliced:
            return [self.seen(denoise, x_s, sigma, batch.cond) for x_s in asked]
        count = len(asked)
        found = self.seen(denoise, torch.cat(asked), sigma.repeat(count), Cond.concat([batch.cond] * count))
        return [[value.chunk(count)[at] for value in found] for at in range(count)]

    # -- the student --------------------------------------------------------------------------------------------------

    def cotangent(self, denoise: Denoiser, batch: Batch, x: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        """d dL_G/dx [B, ...] of each sample's own loss, d the elements of a sample, and numbers: DMD2's weights are of
        a matching loss that is a mean over elements, and ours is a sum."""
        schedule, x = denoise.schedule, x.detach().requires_grad_()
        sigma = self.levels(schedule, batch.uniform("gan level"))
        with torch.enable_grad():
            x_s = add_noise(schedule, x, batch.normal("gan noise"), sigma)
            loss = averaged(self.loss.generator, self.head(self.seen(denoise, x_s, sigma, batch.cond)))
            # times d before the network's backward: float16 ends at 6e-8
            (found,) = torch.autograd.grad(x[0].numel() * loss.sum(), x)
        return found, {"gan": loss.detach().mean()}

    def seen(self, denoise: Denoiser, x_s: Tensor, sigma: Tensor, cond: Cond) -> list[Tensor]:
        """The frozen base's features of x_s [B, ...] at sigma [B]."""
        with denoise.roles.use(TEACHER), self.features.kept(x_s) as found:
            denoise(x_s, sigma, cond)
        return found

    def logit(self, features: Sequence[Tensor]) -> Tensor:
        """H [B], the mean over blocks and cells, of ``features``."""
        return averaged(_itself, self.head(features))


def averaged(each: Callable[[Tensor], Tensor], logits: Logits) -> Tensor:
    """[B]: the mean of ``each`` over a block's logits, and of that over the blocks."""
    return torch.stack([each(part).mean(1) for part in logits]).mean(0)


def _itself(value: Tensor) -> Tensor:
    return value
