"""CDM: its random schedule, its term off the trajectory, and what is left without both: dmd."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from narrowed import narrowed
from oracles import CASES, TAU, At, Case, World, drawn, rows
from small_host import SmallHost, small
from whole_runs import Cancelled, at_call, factors, left, run

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.training.engine.levels import UniformTime
from onestep.training.engine.student import BackwardSimulation, Drawn
from onestep.training.methods import METHODS, off_trajectory, random_schedule, settings_for
from onestep.training.methods.distribution_matching import DistributionMatching
from onestep.training.methods.off_trajectory import OffTrajectory
from onestep.training.methods.random_schedule import RandomSchedule

THREE = [CASES[0], CASES[2], CASES[4]]
"""eps, v and flow."""


def recipe(world: World, steps: int = 4, start: float = 1.0, **more: Any) -> Recipe:
    return replace(Recipe.for_student(world.schedule, steps, "unet", (), start), **more)


def in_numpy(case: Case, share: float) -> tuple[float, float]:
    """(alpha, sigma) at a share of the network's time."""
    from oracles import stable_diffusion_levels

    return (1 - share, share) if "flow" in case.name else stable_diffusion_levels(round(share * 999))


# -- the schedule -----------------------------------------------------------------------------------------------------


def check_schedule(module: ModuleType, case: Case) -> None:
    """N ~ U{2 .. 5}; t_1 the recipe's, the others uniform in (0.02, 0.98) of it and falling."""
    world, counts, later = World(case), [], []
    start = recipe(world, start=0.8)
    first = world.schedule.share_of(start.levels(world.schedule)[:1])
    for step in range(300):
        batch = world.batch(step=step)
        levels = module.RandomSchedule(2, 5)(world.schedule, start, batch)
        assert all(level.shape == (4,) and len(set(level.tolist())) == 1 for level in levels)
        each = torch.stack([level[0] for level in levels])
        assert float(each[0]) == float(start.levels(world.schedule)[0])
        assert bool((each[1:] <= each[:-1]).all())
        counts.append(len(each))
        later += (world.schedule.share_of(each[1:]) / first).tolist()
    assert set(counts) == {2, 3, 4, 5} and abs(np.mean(counts) - module.RandomSchedule(2, 5).mean(start)) < 0.2
    # uniform: mean 1/2 and variance 0.96^2 / 12, within four standard errors
    off = 4 / np.sqrt(len(later))
    assert abs(np.mean(later) - 0.5) < 0.28 * off + 2e-3 and abs(np.std(later) - 0.96 / np.sqrt(12)) < 0.2 * off + 2e-3
    assert min(later) >= 0.018 and max(later) <= 0.982


@pytest.mark.parametrize("case", THREE, ids=str)
def test_the_random_schedule(case: Case) -> None:
    check_schedule(random_schedule, case)


SCHEDULE_MUTANTS = {
    "never the longest": ("self.high - self.low + 1", "self.high - self.low"),
    "rising": ("descending=True", "descending=False"),
    "of all time": ("schedule.share_of(first) * (", "("),
    "the first as well": ("[1:].sort", "[:].sort"),
    "half of it": ("(self.most - self.least) * u", "(self.most - self.least) * u / 2"),
}


@pytest.mark.parametrize("change", SCHEDULE_MUTANTS.values(), ids=list(SCHEDULE_MUTANTS))
def test_a_wrong_schedule_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.random_schedule", *change, monkeypatch)
    must_fail(lambda mutated: check_schedule(mutated, CASES[4]), module)


@pytest.mark.parametrize("case", THREE, ids=str)
def test_a_picture_on_a_random_schedule(case: Case) -> None:
    """In the Gaussian world, step after step in NumPy, along the student's own trajectory."""
    world = World(case)
    own = recipe(world, renoise=False)
    for step in range(3, 9):
        batch = world.batch(step=step)
        found = BackwardSimulation(world.denoise, own, RandomSchedule(2, 5))(batch)
        levels = RandomSchedule(2, 5)(world.schedule, own, batch)
        shares = [float(world.schedule.share_of(level[:1])) for level in levels]
        pairs = [in_numpy(case, share) for share in shares]
        x = np.sqrt(pairs[0][0] ** 2 + pairs[0][1] ** 2) * rows(batch.normal("latent")) * own.initial_noise_scale
        for (alpha, sigma), (alpha_, sigma_) in zip(pairs[: found.step], pairs[1 : found.step + 1], strict=True):
            x0 = world.x0("student", x, world.cond, alpha, sigma)
            x = alpha_ * x0 + sigma_ * (x - alpha * x0) / sigma
        np.testing.assert_allclose(rows(found.x), x, rtol=1e-7, atol=1e-9)
        x0 = world.x0("student", x, world.cond, *pairs[found.step])
        np.testing.assert_allclose(rows(found.x0), x0, rtol=1e-6, atol=1e-8)


# -- off the trajectory -----------------------------------------------------------------------------------------------


def step_of(world: World, share: float = 0.7) -> Drawn:
    """A step of the student's from some x at a share of the time."""
    sigma = world.schedule.sigma_at(torch.full((4,), share, dtype=torch.float64))
    x = drawn(seed=3)
    with world.roles.use("student"):
        x0 = world.denoise(x, sigma, world.cond)
    return Drawn(x0, x, sigma, torch.zeros_like(sigma), 0)


def check_off(module: ModuleType, case: Case) -> None:
    """x' = alpha' D + sigma' (x - alpha D) / sigma, for a flow model x + (t' - t) v; D(x', t') and its G in NumPy; the
    gradient in the student's mean by the chain rule: dD/dmu = sigma^2 / v."""
    world, weight, share = World(case), 0.6, 0.25
    step, batch = step_of(world), world.batch()
    off = module.OffTrajectory(weight, UniformTime(0.4, 0.4))
    objective = DistributionMatching(guidance=2.0, levels=At(case.sigma))
    factors_ = world.double_factors("student")
    off(world.denoise, batch, step, objective, share)
    (alpha, sigma), (alpha_, sigma_) = in_numpy(case, 0.7), in_numpy(case, 0.4)
    x0 = world.x0("student", rows(step.x), world.cond, alpha, sigma)
    x = alpha_ * x0 + sigma_ * (rows(step.x) - alpha * x0) / sigma
    if "flow" in case.name:
        velocity = (rows(step.x) - x0) / 0.7
        np.testing.assert_allclose(x, rows(step.x) + (0.4 - 0.7) * velocity, atol=1e-12)
    np.testing.assert_allclose(rows(off.reached(world.denoise, batch, step)[0]), x, rtol=1e-6, atol=1e-8)
    there = world.x0("student", x, world.cond, alpha_, sigma_)
    x_s = case.alpha * there + case.sigma * rows(batch.normal("off match noise"))
    d_c, d_u = (world.x0("teacher", x_s, cond) for cond in (world.cond, world.null.repeat(4)))
    d_f = world.x0("critic", x_s, world.cond)
    g = (d_f - d_c - (d_c - d_u)) / np.abs(there - d_u - 2 * (d_c - d_u)).mean(1, keepdims=True)
    d_mean = weight * share / 4 * g * sigma_**2 / (alpha_**2 * TAU**2 + sigma_**2)
    a, b = factors_
    outer = d_mean.T @ world.cond.text[:, 0].double().numpy()
    assert a.grad is not None and b.grad is not None
    np.testing.assert_allclose(b.grad.numpy(), outer @ a.detach().numpy().T, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(a.grad.numpy(), b.detach().numpy().T @ outer, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", THREE, ids=str)
def test_the_term_off_the_trajectory(case: Case) -> None:
    check_off(off_trajectory, case)


@pytest.mark.parametrize("case", THREE, ids=str)
def test_off_the_trajectory_too_an_equal_critic_leaves_nothing(case: Case) -> None:
    world = World(case)
    for _, b in world.roles.state("critic").values():
        b.zero_()
    leaves = world.double_factors("student")
    objective = DistributionMatching(guidance=1.0)
    OffTrajectory(1.0)(world.denoise, world.batch(), step_of(world), objective, 1.0)
    assert all(float(leaf.grad.abs().max()) <= 1e-12 for leaf in leaves if leaf.grad is not None)


def test_it_is_off_the_trajectory() -> None:
    """At any level, each sample at its own."""
    world = World(CASES[4])
    _, sigma = OffTrajectory(1.0).reached(world.denoise, world.batch(), step_of(world))
    assert torch.unique(sigma).numel() == 4 and float(sigma.min()) >= 0.02 and float(sigma.max()) <= 0.98


OFF_MUTANTS = {
    "from another level": ("drawn.x0.detach(), drawn.sigma, sigma)", "drawn.x0.detach(), sigma, drawn.sigma)"),
    "unweighted": ("self.weight * share / len(batch)", "share / len(batch)"),
    "a sum over samples": ("self.weight * share / len(batch)", "self.weight * share"),
    "the noise of the other term": ('x0, "off ")', "x0)"),
    "the teacher's answer": ("denoise.roles.use(STUDENT)", 'denoise.roles.use("teacher")'),
    "back to the trajectory": ("x0 = denoise(x, sigma, batch.cond)", "x0 = denoise(drawn.x, drawn.sigma, batch.cond)"),
}


@pytest.mark.parametrize("change", OFF_MUTANTS.values(), ids=list(OFF_MUTANTS))
def test_a_wrong_term_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.off_trajectory", *change, monkeypatch)
    must_fail(lambda mutated: check_off(mutated, CASES[4]), module)


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", narrowed(["epsilon", "v_prediction", "flow"], "v_prediction"))
def test_on_the_recipes_schedule_without_the_term_it_is_dmd(prediction: str, tmp_path: Path) -> None:
    """To the bit: every factor and moment of a run."""
    told = {"student_steps": 3, "anchor": 0.2, "steps": 3}
    one = run(tmp_path / "dmd", small(**told), host=SmallHost(prediction))
    settings = small(method="cdm", student_schedule="fixed", off_trajectory=0.0, **told)
    other = run(tmp_path / "cdm", settings, host=SmallHost(prediction))
    assert factors(one.path) == factors(other.path)
    differs = run(tmp_path / "off", settings.with_(off_trajectory=1.0), host=SmallHost(prediction))
    assert factors(differs.path) != factors(one.path)
    drawn_too = run(tmp_path / "random", settings.with_(student_schedule="random"), host=SmallHost(prediction))
    assert factors(drawn_too.path) != factors(one.path)


@pytest.mark.parametrize("poll", narrowed([17, 26]))
def test_a_run_that_is_stopped_ends_as_if_not(poll: int, tmp_path: Path) -> None:
    settings = small(method="cdm", student_steps=4, diversity_anchor=0.1, diversity_steps=2, critic_pictures="shared")
    run(tmp_path / "whole" / "run", settings)
    with pytest.raises(Cancelled):
        run(tmp_path / "cut" / "run", settings, host=SmallHost(on_poll=at_call(poll, Cancelled())))
    run(tmp_path / "cut" / "run", settings, existing="continue")
    whole, cut = left(tmp_path / "whole" / "run"), left(tmp_path / "cut" / "run")
    assert whole["files"] == cut["files"] and whole["metrics"] == cut["metrics"]


def test_what_has_no_length_is_refused() -> None:
    check, host = METHODS["cdm"].check, SmallHost()
    with pytest.raises(OneStepError, match="schedule_low 2 is above the 1 steps .* several steps"):
        check(host, settings_for("cdm"))
    with pytest.raises(OneStepError, match="schedule_low 9 is above the 8 steps"):
        check(host, settings_for("cdm", schedule_low=9, schedule_high=8))
    with pytest.raises(OneStepError, match="set schedule_low to 2 at least"):
        check(host, settings_for("cdm", schedule_low=1, student_steps=4, diversity_anchor=0.1))
    check(host, settings_for("cdm", student_steps=2))
    check(host, settings_for("cdm", student_schedule="fixed"))
