"""A world with answers in closed form: given a prompt c, pictures are Gaussian with mean W c and deviation tau.

    D*(x, sigma, c) = mu + alpha tau^2 / (alpha^2 tau^2 + sigma^2) (x - alpha mu),   mu = (W + B A) c

The networks here are real ones: mu is an nn.Linear that is a Target, so every role has a mean of its own, and the rest
is the parameterisation under test. What is expected of them is written apart, in NumPy, from the equation above.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from onestep.core.adapter_module import Call
from onestep.core.cond import Cond
from onestep.core.denoiser import EpsDenoiser, FlowDenoiser, VDenoiser, X0Denoiser
from onestep.core.roles import Roles
from onestep.core.schedule import FlowSchedule, NoiseSchedule, VPSchedule
from onestep.core.targets import Target
from onestep.training.engine.batch import Batch

Array = np.ndarray[Any, np.dtype[np.float64]]
SHAPE = (2, 2, 2)
WIDTH = 8
WORDS = 3
TAU = 0.7


# -- what is expected, in NumPy ---------------------------------------------------------------------------------------


def posterior_mean(x: Array, alpha: Array | float, sigma: Array | float, mean: Array) -> Array:
    """E[x0 | x] for x0 ~ N(mean, tau^2), x = alpha x0 + sigma n: the module's equation. All [B, WIDTH], levels [B]."""
    a, s = (np.reshape(np.asarray(level, np.float64), (-1, 1)) for level in (alpha, sigma))
    return mean + a * TAU**2 / (a**2 * TAU**2 + s**2) * (x - a * mean)


def stable_diffusion_levels(time: int, zero_terminal: bool = False) -> tuple[float, float]:
    """(alpha, sigma) of Stable Diffusion's scaled-linear betas; zero-terminal as arXiv:2305.08891, Algorithm 1."""
    root = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2) ** 0.5
    if zero_terminal:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return float(root[time]), float(np.sqrt(1 - root[time] ** 2))


# -- the networks -----------------------------------------------------------------------------------------------------


class GaussianNetwork(nn.Module):
    """Answers in one parameterisation, as a network does: told its own time. Finite wherever its answer is defined."""

    def __init__(self, answers: str, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.mean = nn.Linear(WORDS, WIDTH, bias=False, dtype=torch.float64)
        self.answers, self.schedule = answers, schedule

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        sigma = self.schedule.sigma_of_time(time)[:, None].to(x)
        alpha = self.schedule.alpha(sigma).to(x)
        mean = self.mean(cond.text[:, 0].to(self.mean.weight)).to(x)
        centred, variance = x.flatten(1) - alpha * mean, alpha**2 * TAU**2 + sigma**2
        x0, noise = mean + alpha * TAU**2 / variance * centred, sigma / variance * centred
        answer = {"x0": x0, "eps": noise, "v": alpha * noise - sigma * x0, "flow": noise - x0}[self.answers]
        return answer.reshape(x.shape)


@dataclass(frozen=True)
class Case:
    """One parameterisation at one level: (alpha, sigma) there, written without our schedules."""

    name: str
    wrap: Callable[..., Any]
    answers: str
    schedule: Callable[[], NoiseSchedule]
    alpha: float
    sigma: float

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("eps", EpsDenoiser, "eps", VPSchedule.scaled_linear, *stable_diffusion_levels(500)),
    Case("eps, last time", EpsDenoiser, "eps", VPSchedule.scaled_linear, *stable_diffusion_levels(999)),
    Case("v", VDenoiser, "v", VPSchedule.scaled_linear, *stable_diffusion_levels(300)),
    Case("x0", X0Denoiser, "x0", VPSchedule.scaled_linear, *stable_diffusion_levels(700)),
    Case("flow", FlowDenoiser, "flow", FlowSchedule, 0.4, 0.6),
    Case("flow, t = 1", FlowDenoiser, "flow", lambda: FlowSchedule(3.0), 0.0, 1.0),
    Case(
        "v, zero-terminal",
        VDenoiser,
        "v",
        lambda: VPSchedule.scaled_linear(zero_terminal=True),
        *stable_diffusion_levels(999, zero_terminal=True),
    ),
]


def levels_in_numpy(case: Case, u: Array) -> tuple[Array, Array]:
    """(alpha, sigma) [B, 1] at U[0.02, 0.98] of the network's time."""
    time = 0.02 + 0.96 * u
    if "flow" in case.name:
        shift = 3 if "t = 1" in case.name else 1
        sigma = shift * time / (1 + (shift - 1) * time)
        return 1 - sigma[:, None], sigma[:, None]
    index = np.round(time * 999).astype(int)
    table = np.array([stable_diffusion_levels(i, zero_terminal="zero" in case.name) for i in index])
    return table[:, :1], table[:, 1:]


class World:
    """A case's denoiser on real roles, and the means of each role in NumPy."""

    def __init__(self, case: Case, *, seed: int = 0, rank: int = 2) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.case, self.schedule = case, case.schedule()
        self.network = GaussianNetwork(case.answers, self.schedule).requires_grad_(False)
        self.network.mean.weight.copy_(torch.randn(WIDTH, WORDS, generator=draw, dtype=torch.float64))
        self.roles = Roles([Target("mean", self.network.mean)])
        for role in ("student", "critic"):
            self.roles.add(role, rank, seed)
            for a, b in self.roles.state(role).values():
                a.add_(0.3 * torch.randn(a.shape, generator=draw))
                b.copy_(0.5 * torch.randn(b.shape, generator=draw))
        self.roles.install()
        self.denoise = case.wrap(self.network, self.schedule, self.roles)
        self.cond = Cond(torch.randn(4, 1, WORDS, generator=draw))
        self.null = Cond(torch.randn(1, 1, WORDS, generator=draw))

    def sigma(self, count: int = 4) -> Tensor:
        return torch.full((count,), self.case.sigma, dtype=torch.float64)

    def weight(self, role: str) -> Array:
        """W + B A [WIDTH, WORDS] of a role."""
        base = self.network.mean.weight.numpy().copy()
        if role == "teacher":
            return base
        a, b = self.roles.state(role)["mean"]
        return base + b.numpy().astype(np.float64) @ a.numpy().astype(np.float64)

    def mean(self, role: str, cond: Cond) -> Array:
        """mu [B, WIDTH]."""
        return cond.text[:, 0].numpy().astype(np.float64) @ self.weight(role).T

    def x0(self, role: str, x: Array, cond: Cond, alpha: Any = None, sigma: Any = None) -> Array:
        """D* of a role [B, WIDTH], at the case's level unless another is given."""
        alpha, sigma = (self.case.alpha, self.case.sigma) if alpha is None else (alpha, sigma)
        return posterior_mean(x, alpha, sigma, self.mean(role, cond))

    def double_factors(self, role: str) -> list[Tensor]:
        """Turn a role's factors into float64 leaves, for finite differences; returns them."""
        self.roles._factors[role] = {
            name: tuple(f.detach().double().requires_grad_() for f in pair)  # type: ignore[misc]
            for name, pair in self.roles._factors[role].items()
        }
        return self.roles.parameters(role)

    def check_gradient(self, d_mean: Array) -> None:
        """The student's factors have the gradient that follows from dL/dmu [B, WIDTH], the critic's none."""
        a, b = self.roles.parameters("student")
        d_weight = d_mean.T @ self.cond.text[:, 0].double().numpy()
        assert a.grad is not None and b.grad is not None
        np.testing.assert_allclose(b.grad.numpy(), d_weight @ a.detach().double().numpy().T, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(a.grad.numpy(), b.detach().double().numpy().T @ d_weight, rtol=1e-4, atol=1e-6)
        assert all(factor.grad is None for factor in self.roles.parameters("critic"))

    def batch(self, *, step: int = 3, null: bool = True, cond: Cond | None = None) -> ExactBatch:
        cond = self.cond if cond is None else cond
        nulls = self.null if null else None
        return ExactBatch(cond, nulls, 5, step, range(len(cond)), SHAPE, torch.device("cpu"))


class ExactGuidance(nn.Module):
    """A side that moves the Gaussian world's mean as guidance does: mu_u + w (mu_c - mu_u)."""

    def __init__(self, null: Tensor) -> None:
        super().__init__()
        self.null = nn.Parameter(null)
        self.before, self.after = frozenset[str](), frozenset({"mean"})

    def on_input(self, name: str, x: Tensor, call: Call) -> Tensor:
        return x

    def on_output(self, name: str, x: Tensor, output: Tensor, call: Call) -> Tensor:
        assert call.cond.guidance is not None
        return self.null + call.cond.guidance[:, None] * (output - self.null)


@dataclass(frozen=True)
class ExactBatch(Batch):
    """The same numbers in float64, so that an equation can be checked to twelve places."""

    def normal(self, stream: str) -> Tensor:
        return super().normal(stream).double()


@dataclass(frozen=True)
class At:
    """A level sampler that always looks at one level."""

    sigma: float

    def __call__(self, schedule: NoiseSchedule, u: Tensor) -> Tensor:
        return torch.full_like(u, self.sigma)


def rows(x: Tensor) -> Array:
    """[B, C, h, w] -> [B, WIDTH], in NumPy."""
    return x.detach().double().flatten(1).numpy()


def drawn(count: int = 4, seed: int = 11) -> Tensor:
    """[B, *SHAPE] standard normal, float64."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
