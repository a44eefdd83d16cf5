"""The teacher's second-order steps: their order on an ODE in closed form, where they end, and what they leave alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onestep.core.cond import Cond
from onestep.core.denoiser import X0Denoiser
from onestep.core.roles import Roles
from onestep.core.sampling import fewer, second_order_levels, slope, teacher_sample, trajectory
from onestep.core.schedule import FlowSchedule, NoiseSchedule, VPSchedule

COND = Cond(torch.zeros(1, 1, 1, dtype=torch.float64))
MEAN, DEVIATION = 0.7, 0.6
SCHEDULES = {"vp": VPSchedule.scaled_linear(), "flow": FlowSchedule(), "shifted": FlowSchedule(3.0)}


def gaussian(schedule: NoiseSchedule) -> Any:
    """D of data ~ N(m, d^2): m + alpha d^2 (x - alpha m) / (alpha^2 d^2 + sigma^2)."""

    def answer(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        sigma = schedule.sigma_of_time(time.double())[:, None]
        alpha = schedule.alpha(sigma)
        return MEAN + alpha * DEVIATION**2 * (x - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)

    return X0Denoiser(answer, schedule, Roles([]))


def exact(schedule: NoiseSchedule, x: Tensor, first: float, last: float) -> Tensor:
    """Where the ODE from x at ``first`` is at ``last``: the standard score is constant along it. And D there."""
    spread = []
    for sigma in (first, last):
        alpha = float(schedule.alpha(torch.tensor(sigma, dtype=torch.float64)))
        spread.append((alpha, np.sqrt(alpha**2 * DEVIATION**2 + sigma**2)))
    (a, s), (b, r) = spread
    there = b * MEAN + r * (x - a * MEAN) / s
    return MEAN + b * DEVIATION**2 * (there - b * MEAN) / r**2


def error(schedule: NoiseSchedule, steps: int, second_order: bool) -> float:
    noise = torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cond = Cond(torch.zeros(64, 1, 1, dtype=torch.float64))
    seen = list(trajectory(gaussian(schedule), cond, None, noise, steps, 1.0, second_order=second_order))
    start, first, last = seen[0][0], float(seen[0][1][0]), float(seen[-1][1][0])
    return float((seen[-1][2] - exact(schedule, start, first, last)).abs().max())


@pytest.mark.parametrize("name", ["flow", "shifted"])
def test_twice_the_steps_are_a_quarter_of_the_error(name: str) -> None:
    """Second order; the first order's error is only halved."""
    schedule = SCHEDULES[name]
    for second, least, most in ((True, 2.8, 6.0), (False, 1.6, 2.6)):
        ratio = error(schedule, 320, second) / error(schedule, 640, second)
        assert least < ratio < most, (second, ratio)


@pytest.mark.parametrize("name", SCHEDULES)
def test_fewer_of_second_order_are_nearer(name: str) -> None:
    for steps in (20, 40):
        assert error(SCHEDULES[name], steps, True) < error(SCHEDULES[name], steps, False)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [8, 20, 25, 50])
def test_it_goes_between_the_same_levels_in_fewer_equal_steps(name: str, steps: int) -> None:
    schedule = SCHEDULES[name]
    levels, all_of_them = second_order_levels(schedule, steps), schedule.sigma_of_time(schedule.trailing(steps))
    assert len(levels) == fewer(steps) == int(np.ceil(0.6 * steps))
    assert torch.equal(levels[[0, -1]], all_of_them[[0, -1]]) and bool((levels.diff() < 0).all())
    times = schedule.time_of_sigma(levels).diff()
    assert float((times - times.mean()).abs().max()) <= 1.0


def test_the_slope_is_the_papers() -> None:
    """DPM-Solver++(2M), Algorithm 2: r_i = h_(i-1) / h_i, D_i = (1 + 1 / (2 r_i)) x_i - 1 / (2 r_i) x_(i-1)."""
    schedule = SCHEDULES["vp"]
    sigmas = torch.tensor([0.99, 0.8, 0.3, 0.1], dtype=torch.float64)
    lam = np.log(np.sqrt(1 - sigmas.numpy() ** 2) / sigmas.numpy())
    for step in (1, 2):
        r = (lam[step] - lam[step - 1]) / (lam[step + 1] - lam[step])
        assert slope(schedule, sigmas, step) == pytest.approx(1 / (2 * r), rel=1e-12)
    flow = torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64)
    assert slope(SCHEDULES["flow"], flow, 1) == 0.0, "behind pure noise there is no log-SNR"


def test_first_order_is_what_it_was() -> None:
    """DDIM by hand: x' = a' D + s' (x - a D) / s."""
    schedule, noise = SCHEDULES["vp"], torch.randn(3, 1, dtype=torch.float64)
    denoise, cond = gaussian(schedule), Cond(torch.zeros(3, 1, 1, dtype=torch.float64))
    x, sigmas = noise, schedule.sigma_of_time(schedule.trailing(5))
    for step, sigma in enumerate(sigmas.tolist()):
        d = denoise(x, torch.full((3,), sigma, dtype=torch.float64), cond)
        if step < 4:
            lower = float(sigmas[step + 1])
            a, b = np.sqrt(1 - sigma**2), np.sqrt(1 - lower**2)
            x = b * d + lower * (x - a * d) / sigma
    torch.testing.assert_close(teacher_sample(denoise, cond, None, noise, 5, 1.0), d)
