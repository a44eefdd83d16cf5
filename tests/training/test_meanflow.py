"""Mean velocities in closed form, their identity, and what they become where both times are one."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from oracles import CASES, TAU, Array, Case, World, drawn, rows
from torch import Tensor
from two_times_oracle import answer

from onestep.core.continuous import leading
from onestep.core.roles import TEACHER
from onestep.core.schedule import expand
from onestep.training.engine.student import STUDENT
from onestep.training.methods import meanflow as method
from onestep.training.methods.tangents import Differences, straight_on

WORLDS = [case for case in CASES if case.name != "x0"]
NEAR = Differences(0.01, 1e-3, 0.97, straight_on)


def expected(world: World, learn: Any, x0: Array, noise: Array) -> tuple[Array, Array, Array]:
    """(u, its target, t), [B, WIDTH] each."""
    batch = world.batch()
    t, r = (value.numpy()[:, None] for value in learn.times(batch))
    y = (1 - t) * x0 + t * noise
    null, zero = world.cond.null_like(world.null), np.zeros_like(r)
    d_c, d_u = (answer(world, TEACHER, y, t, zero, cond) for cond in (world.cond, null))
    v = d_u + learn.guidance * (d_c - d_u)
    above, below = np.minimum(t * 1.01, 0.97), np.maximum(t * 0.99, 1e-3)
    ends = [answer(world, STUDENT, y + (at - t) * v, at, r, world.cond) for at in (above, below)]
    change = (ends[0] - ends[1]) / (above - below)
    return answer(world, STUDENT, y, t, r, world.cond), v - (t - r) * change, t


def check(module: ModuleType, case: Case) -> None:
    world, x0 = World(case), drawn(seed=1)
    learn = module.MeanFlow(module.TwoLogits(-0.4, 1.0, 0.4, 0.3, 0.97), NEAR, 3.0)
    batch = world.batch()
    loss = learn(world.denoise, batch, x0)
    loss.backward()
    u, target, t = expected(world, learn, rows(x0), rows(batch.normal("flow noise")))
    s = ((u - target) ** 2).sum(1)
    assert float(loss.detach()) == pytest.approx((s / (s + 0.01)).mean(), rel=1e-6)
    if case.answers == "flow" and "t = 1" not in case.name:
        # told t - r / 2, the flow's prediction v moves by -(n + x0)' of the told posterior: du / dmean = -d v / d mean
        told = torch.tensor(t) - learn.times(batch)[1][:, None] / 2
        at = told.numpy()
        slope = -(at / ((1 - at) ** 2 * TAU**2 + at**2))
        world.check_gradient(2 * (u - target) / (s + 0.01)[:, None] / 4 * slope)


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_the_loss_in_closed_form(case: Case) -> None:
    check(method, case)


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_its_gradient_by_finite_differences(case: Case) -> None:
    """Of what is not held: |u - sg(target)|^2 / sg(.)."""
    world, x0 = World(case), drawn(seed=1)
    factors = world.double_factors(STUDENT)
    learn = method.MeanFlow(method.TwoLogits(-0.4, 1.0, 0.4, 0.3, 0.97), NEAR, 3.0)
    batch = world.batch()
    learn(world.denoise, batch, x0).backward()
    u, target, _ = expected(world, learn, rows(x0), rows(batch.normal("flow noise")))
    held = ((u - target) ** 2).sum(1) + 0.01

    def value() -> float:
        u, _, _ = expected(world, learn, rows(x0), rows(batch.normal("flow noise")))
        return float((((u - target) ** 2).sum(1) / held).mean())

    for factor in factors:
        place = tuple(0 for _ in factor.shape)
        with torch.no_grad():
            ends = []
            for step in (1e-6, -2e-6):
                factor[place] += step
                ends.append(value())
            factor[place] += 1e-6
        assert float(factor.grad[place]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-7)


def test_where_both_times_are_one_it_is_flow_matching() -> None:
    """S = |u - v|^2: nothing is left of the change."""
    world, x0 = World(CASES[4]), drawn(seed=1)
    learn = method.MeanFlow(method.TwoLogits(-0.4, 1.0, 0.0, 1.0, 0.97), NEAR, 3.0)
    batch = world.batch()
    t, r = learn.times(batch)
    assert torch.equal(t, r)
    u, target, at = expected(world, learn, rows(x0), rows(batch.normal("flow noise")))
    y = (1 - at) * rows(x0) + at * rows(batch.normal("flow noise"))
    null, zero = world.cond.null_like(world.null), np.zeros_like(at)
    d_c, d_u = (answer(world, TEACHER, y, at, zero, cond) for cond in (world.cond, null))
    np.testing.assert_allclose(target, d_u + 3 * (d_c - d_u))
    s = ((u - target) ** 2).sum(1)
    assert float(learn(world.denoise, batch, x0).detach()) == pytest.approx((s / (s + 0.01)).mean(), rel=1e-9)


def test_the_mean_of_a_gaussians_velocities_is_the_fixed_point() -> None:
    """u = (y_t - y_r) / (t - r) on the ODE's own solution solves u = v - (t - r) du/dt."""
    mean, y = drawn(seed=2), drawn(seed=1)
    t, r = (torch.tensor(values, dtype=torch.float64) for values in ([0.3, 0.6, 0.9, 0.95], [0.0, 0.5, 0.1, 0.0]))

    def scale(t: Tensor) -> Tensor:
        return torch.sqrt((1 - t) ** 2 * TAU**2 + t**2)

    def u(y: Tensor, t: Tensor) -> Tensor:
        there = expand((1 - r), y) * mean + expand(scale(r) / scale(t), y) * (y - expand(1 - t, y) * mean)
        return (y - there) / expand(t - r, y)

    # v = dy / dt of y_t = (1 - t) mu + s(t) e
    slope = expand((t - (1 - t) * TAU**2) / scale(t) ** 2, y)
    v = -mean + slope * (y - expand(1 - t, y) * mean)
    change = Differences(1e-3, 1e-3, 0.999, straight_on)(u, y, t, v)
    torch.testing.assert_close(u(y, t), v - expand(t - r, y) * change, rtol=1e-4, atol=1e-4)


def test_its_times() -> None:
    world = World(CASES[4])
    many = world.batch(cond=world.cond[torch.zeros(4000, dtype=torch.long)])
    t, r = method.TwoLogits(-0.4, 1.0, 0.4, 0.3, 0.9)(many)
    assert bool((t >= r).all()) and float(t.max()) == 0.9
    assert float((r == 0).double().mean()) == pytest.approx(0.4, abs=0.03)
    assert float((r == t).double().mean()) == pytest.approx(0.3, abs=0.03)


def test_the_second_time_is_told_by_half() -> None:
    for case in (CASES[2], CASES[4]):
        world = World(case)
        schedule, zero = world.schedule, torch.zeros(4, dtype=torch.float64)
        most = float(schedule.time_of_sigma(torch.tensor(schedule.sigma_max, dtype=torch.float64)))
        sigma, lower = (schedule.sigma_of_time(torch.full((4,), share * most).double()) for share in (0.8, 0.4))
        whole, half = schedule.time_of_sigma(sigma), schedule.time_of_sigma(lower)
        torch.testing.assert_close(leading(world.denoise, lower).network_time(sigma), whole - half / 2)
        assert torch.equal(leading(world.denoise, zero).network_time(sigma), world.denoise.network_time(sigma))


MUTANTS: dict[str, tuple[str, str]] = {
    "the change added": ("(v - expand(t - r, v) * change)", "(v + expand(t - r, v) * change)"),
    "the whole time": ("expand(t - r, v) * change", "expand(t, v) * change"),
    "unguided": ("batch.nulls(), self.guidance)", "batch.nulls(), 1.0)"),
    "the student's own velocity": ("denoise.roles.use(TEACHER)", "denoise.roles.use(STUDENT)"),
    "another end": ("level_of(denoise.schedule, r)", "level_of(denoise.schedule, t)"),
    "not weighed": ("(s / (s.detach() + SMALL)).mean()", "s.mean()"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_loss_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.meanflow", *change, monkeypatch)
    must_fail(lambda mutated: check(mutated, CASES[4]), module)
