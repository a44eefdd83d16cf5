"""BOOT's loss in closed form, its gradient by finite differences, and where its steps lead."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from oracles import CASES, TAU, Array, Case, World, drawn, posterior_mean, rows
from small_host import SmallHost, setup_of, small
from trajectory_oracle import led, ratios
from two_times_oracle import answer, levels

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.core.roles import TEACHER
from onestep.core.sampling import initial_latents
from onestep.training.engine.student import STUDENT
from onestep.training.methods import METHODS
from onestep.training.methods import boot as method
from onestep.training.methods.trajectory import Grid

WORLDS = [case for case in CASES if case.name != "x0"]
GUIDANCE = 3.0


def grid(world: World) -> Grid:
    return Grid(Recipe.at(world.schedule, world.schedule.trailing(1)), 6)


def made(module: ModuleType, world: World, boundary: float) -> Any:
    return module.Boot(grid(world), boundary, GUIDANCE, partial(initial_latents, scale=1.0))


def signal(world: World, x: Array, high: Array, t: Array) -> Array:
    """The student's D of the noise, told that it leads to t."""
    a = ratios(world, high)
    y, tau = x / (a + high), high / (a + high)
    return y - tau * answer(world, STUDENT, y, tau, t / (ratios(world, t) + t), world.cond)


def expected(world: World, noise: Array, boundary: float) -> tuple[Array, Array]:
    """(y(e, s), its target) [B, WIDTH]: the target by DDIM's step of x_t, from which the noise is taken off."""
    batch, ends = world.batch(), grid(world).levels(world.schedule).numpy()
    at = 1 + np.floor(batch.uniform("boot time").numpy() * (len(ends) - 1)).astype(int)
    first = (batch.uniform("boot boundary").numpy() < boundary)[:, None]
    high = np.full_like(first, ends[0], float)
    s, t = np.where(first, high, ends[at][:, None]), np.where(first, high, ends[at - 1][:, None])
    x = np.hypot(ratios(world, high), high) * noise
    x_t = np.where(first, x, ratios(world, t) * signal(world, x, high, t) + t * noise)
    null = world.cond.null_like(world.null)
    d_c, d_u = (world.x0(TEACHER, x_t, cond, ratios(world, t), t) for cond in (world.cond, null))
    f = d_u + GUIDANCE * (d_c - d_u)
    y_s = (led(world, x_t, f, t, s) - s * noise) / np.maximum(ratios(world, s), 1e-300)
    return signal(world, x, high, s), np.where(first, f, y_s)


def check(module: ModuleType, case: Case) -> None:
    noise = drawn(seed=1)
    for boundary in (0.0, 0.5, 1.0):
        world = World(case)
        loss = made(module, world, boundary)(world.denoise, world.batch(), noise)
        y, target = expected(world, rows(noise), boundary)
        assert float(loss.detach()) == pytest.approx(((y - target) ** 2).sum(1).mean(), rel=1e-6)


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_the_loss_in_closed_form(case: Case) -> None:
    check(method, case)


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_its_gradient_by_finite_differences(case: Case) -> None:
    """Of y(e, s) alone: the target is held."""
    world, noise = World(case), drawn(seed=1)
    factors = world.double_factors(STUDENT)
    made(method, world, 0.3)(world.denoise, world.batch(), noise).backward()
    _, target = expected(world, rows(noise), 0.3)
    for factor in factors:
        place, ends = tuple(0 for _ in factor.shape), []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                factor[place] += step
                ends.append(float(((expected(world, rows(noise), 0.3)[0] - target) ** 2).sum(1).mean()))
            factor[place] += 1e-6
        assert factor.grad is not None
        assert float(factor.grad[place]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-6)


def check_steps(module: ModuleType, case: Case) -> None:
    """From what the teacher answers to the noise, the steps end where the Gaussian's own trajectory does."""
    world, noise = World(case), rows(drawn(seed=1))
    schedule, mean = world.schedule, world.mean(TEACHER, world.cond)
    ends = Grid(Recipe.at(schedule, schedule.trailing(1)), 900).levels(schedule).numpy()
    a, s = (float(part) for part in (ratios(world, ends[:1])[0], ends[0]))
    # x_T that has exactly this noise, of the signal y_T
    y = posterior_mean(s * noise, a, s, mean)
    x_high = a * y + s * noise
    for t, lower in zip(ends[:-1], ends[1:], strict=True):
        a_t = float(ratios(world, np.array([t]))[0])
        f = posterior_mean(a_t * y + t * noise, a_t, t, mean)
        told = (torch.full((4,), level, dtype=torch.float64) for level in (t, lower))
        y = rows(module.led(schedule, *(torch.from_numpy(part) for part in (y, f)), *told))
    spread = np.sqrt(a**2 * TAU**2 + s**2)
    np.testing.assert_allclose(y, mean + TAU * (x_high - a * mean) / spread, atol=0.02)


@pytest.mark.parametrize("case", [case for case in WORLDS if case.name in ("eps", "v", "flow")], ids=str)
def test_its_steps_follow_the_trajectory(case: Case) -> None:
    check_steps(method, case)


def test_the_first_step_forgets_what_was_before_it() -> None:
    """Where the noise is all, alpha = 0, y_s = f."""
    world = World(CASES[5])
    y, f = drawn(seed=1), drawn(seed=2)
    ends = grid(world).levels(world.schedule)
    t, s = (ends[at].expand(4) for at in (0, 1))
    assert float(t[0]) == 1 and torch.equal(method.led(world.schedule, y, f, t, s), f)


def test_the_network_is_told_its_own_time_where_it_leads_to_the_picture() -> None:
    """What any sampler tells it."""
    world = World(CASES[4])
    high, noise = torch.full((4,), 0.8, dtype=torch.float64), drawn(seed=1)
    with world.roles.use(STUDENT):
        plain = world.denoise(noise, high, world.cond)
    found = made(method, world, 0.0)._signal(world.denoise, world.batch(), noise, high, torch.zeros_like(high))
    assert torch.equal(found, plain)
    assert levels(world, np.zeros((1, 1))) == 0


def test_several_steps_are_refused(tmp_path: Path) -> None:
    host = SmallHost()
    with pytest.raises(OneStepError, match="student_steps is 2: set it to 1"):
        METHODS["boot"].check_all(host, small(method="boot", student_steps=2), False)
    METHODS["boot"].check_all(host, small(method="boot", student_steps=1), False)


def test_it_makes_no_pictures_of_the_teachers(tmp_path: Path) -> None:
    setup = setup_of(SmallHost("flow"), small(method="boot", student_steps=1), tmp_path)
    phase = METHODS["boot"].plan(setup).phases[0]
    assert phase.fresh == 0 and phase.fresh_cost == 0 and not (tmp_path / "pairs").exists()


MUTANTS: dict[str, tuple[str, str]] = {
    "the step the other way": (
        "kept = s * schedule.alpha(t) / (schedule.alpha(s).clamp_min(1e-12) * t)",
        "kept = t * schedule.alpha(s) / (schedule.alpha(t).clamp_min(1e-12) * s)",
    ),
    "no signal's scale": ("kept = s * schedule.alpha(t) / (schedule.alpha(s).clamp_min(1e-12) * t)", "kept = s / t"),
    "towards the student": ("f + expand(kept, f) * (y - f)", "y + expand(kept, f) * (f - y)"),
    "without the noise": ("add_noise(denoise.schedule, y_t, noise, t)", "y_t"),
    "unguided": ("batch.nulls(), self.guidance)", "batch.nulls(), 1.0)"),
    "the student's own answer": ("denoise.roles.use(TEACHER)", "denoise.roles.use(STUDENT)"),
    "no boundary": ('batch.uniform("boot boundary") < self.boundary', 'batch.uniform("boot boundary") < 0'),
    "no second time": ("leading(denoise, t)(x, high", "denoise(x, high"),
    "a mean": (
        "square(self._signal(denoise, batch, x, high, s), target).mean()",
        "square(self._signal(denoise, batch, x, high, s), target).sum()",
    ),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_loss_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    must_fail(lambda wrong: check(wrong, CASES[4]), mutant("onestep.training.methods.boot", *change, monkeypatch))
