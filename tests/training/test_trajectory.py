"""The consistency methods' one training step in closed form, and what becomes what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from oracles import CASES, TAU, Array, Case, World, drawn, rows
from small_host import SmallHost, setup_of, small
from trajectory_oracle import led, loss_of, ratios

from onestep.core.recipe import Recipe
from onestep.core.roles import TEACHER
from onestep.training.data.pairs import Pairs
from onestep.training.engine.student import STUDENT, add_student
from onestep.training.methods import METHODS, lcm, mlcm, tcd
from onestep.training.methods import near_times as near
from onestep.training.methods import trajectory as method
from onestep.training.methods.consistency import Pictures, grid_of

PARTS = 6
C = 1e-3
# x0-prediction is told nothing of sigma by its own formula, as no model of a user's is
WORLDS = [case for case in CASES if case.name != "x0"]


def answer(world: World, role: str, x: Array, sigma: Array, cond: Any) -> Array:
    return world.x0(role, x, cond, ratios(world, sigma), sigma)


class Expected:
    """One batch of `TwoTimes` in NumPy, on the levels that its times gave."""

    def __init__(self, world: World, span: method.Span, x0: Array, noise: Array, low: float, high: float) -> None:
        path, self.s = span.path.numpy()[..., None], span.s.numpy()[:, None]
        self.world, self.t, self.r = world, path[0], path[-1]
        self.x_t = ratios(world, self.t) * x0 + self.t * noise
        null = world.cond.null_like(world.null)
        w = low + (high - low) * world.batch().uniform("trajectory guidance").numpy()[:, None]
        x = self.x_t
        for sigma, lower in zip(path[:-1], path[1:], strict=True):
            d_c, d_u = (answer(world, TEACHER, x, sigma, cond) for cond in (world.cond, null))
            moved = led(world, x, d_u + w * (d_c - d_u), sigma, lower)
            x = np.where(lower < sigma, moved, x)
        self.x_r = x

    def ends(self, x_r: Array | None = None) -> tuple[Array, Array]:
        """(the answer, the target)."""
        x_r = self.x_r if x_r is None else x_r
        of_r = answer(self.world, STUDENT, x_r, np.maximum(self.r, 1e-9), self.world.cond)
        target = np.where(self.r > self.s, led(self.world, x_r, of_r, self.r, self.s), x_r)
        of_t = answer(self.world, STUDENT, self.x_t, self.t, self.world.cond)
        return led(self.world, self.x_t, of_t, self.t, self.s), target

    def slope(self) -> Array:
        """d answer / d mean: (alpha_s - sigma_s alpha_t / sigma_t) sigma_t^2 / (alpha_t^2 tau^2 + sigma_t^2)."""
        alpha_t, alpha_s = ratios(self.world, self.t), ratios(self.world, self.s)
        of_d = alpha_s - self.s * alpha_t / self.t
        return of_d * self.t**2 / (alpha_t**2 * TAU**2 + self.t**2)


def recipe_of(world: World, steps: int = 2) -> Recipe:
    start = 0.9 if world.case.answers == "eps" else 1.0
    return Recipe.for_student(world.schedule, steps, "unet", (), start)


ENDS: dict[str, tuple[str, int, float, float]] = {
    "to the picture": ("to_the_picture", 1, 4.0, 4.0),
    "drawn guidance": ("to_the_picture", 1, 1.5, 7.0),
    "no guidance": ("anywhere_below", 1, 1.0, 1.0),
    "several steps": ("to_the_picture", 3, 3.0, 3.0),
    "phases, several steps": ("phases", 4, 3.0, 5.0),
}


def check(module: ModuleType, case: Case, name: str) -> None:
    world = World(case)
    told, stride, low, high = ENDS[name]
    end = module.PhaseEnd(2) if told == "phases" else getattr(module, told)
    times = module.Grid(recipe_of(world), PARTS, end, stride)
    loss = module.TwoTimes(times, module.TeacherSteps(low, high), module.Huber(C))
    x0, noise = drawn(seed=1), drawn(seed=2)
    # each sample at another place, up to the last step, behind which is the picture
    start = module.Noised(x0, noise, torch.tensor([0.999, 0.55, 0.3, 0.05], dtype=torch.float64))
    span = times(world.schedule, world.batch(), start.u)
    found = loss(world.denoise, world.batch(), start)
    found.backward()
    expected = Expected(world, span, rows(x0), rows(noise), low, high)
    got, target = expected.ends()
    error = got - target
    assert float(found.detach()) == pytest.approx((np.sqrt(error**2 + C**2) - C).sum(1).mean(), rel=1e-7)
    world.check_gradient(error / np.sqrt(error**2 + C**2) / 4 * expected.slope())


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_the_loss_and_its_gradient_in_closed_form(case: Case, name: str) -> None:
    check(method, case, name)


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_without_a_teacher_both_times_have_the_same_noise(case: Case) -> None:
    """And the whole sample's distance, weighed by 1 / (t - r)."""
    world = World(case)
    times = method.Grid(recipe_of(world), PARTS)
    loss = method.TwoTimes(times, method.same_noise, method.WholeHuber(0.01), near.inverse_gap)
    x0, noise = drawn(seed=1), drawn(seed=2)
    start = method.Noised(x0, noise, torch.tensor([0.999, 0.55, 0.3, 0.15], dtype=torch.float64))
    span = times(world.schedule, world.batch(), start.u)
    expected = Expected(world, span, rows(x0), rows(noise), 1.0, 1.0)
    got, target = expected.ends(ratios(world, expected.r) * rows(x0) + expected.r * rows(noise))
    c = 0.01 * np.sqrt(got.shape[1])
    distance = np.sqrt(((got - target) ** 2).sum(1) + c**2) - c
    t, r = (sigma / ratios(world, sigma) for sigma in (expected.t, expected.r))
    wanted = (distance / (t - r)[:, 0]).mean()
    assert float(loss(world.denoise, world.batch(), start).detach()) == pytest.approx(wanted, rel=1e-7)


def test_a_stochastic_step_keeps_the_marginal() -> None:
    """x_r of DDIM's eta has the variance alpha_r^2 tau^2 + sigma_r^2 of the forward process, whatever its eta."""
    world = World(CASES[2])
    sigma, lower = (torch.full((20_000,), level, dtype=torch.float64) for level in (0.8, 0.5))
    draw = torch.Generator().manual_seed(0)
    x0, noise, fresh = torch.randn(3, 20_000, 8, dtype=torch.float64, generator=draw)
    x0 = TAU * x0
    x = 0.6 * x0 + 0.8 * noise
    for eta in (0.0, 0.5, 1.0):
        # with the true picture in place of D the step is the exact conditional
        moved = method.noisy_jump(world.schedule, x, x0, sigma, lower, eta, lambda: fresh)
        assert float(moved.var()) == pytest.approx(0.75 * TAU**2 + 0.25, rel=0.02)
    # at eta 1 the noise is DDPM's posterior: c = 0.5 sqrt(1 - (0.6 0.5 / (0.866 0.8))^2)
    plain = method.noisy_jump(world.schedule, x, x0, sigma, lower, 1.0, lambda: torch.zeros_like(fresh))
    c = 0.5 * np.sqrt(1 - (0.6 * 0.5 / (np.sqrt(0.75) * 0.8)) ** 2)
    moved = method.noisy_jump(world.schedule, x, x0, sigma, lower, 1.0, lambda: fresh)
    torch.testing.assert_close(moved - plain, c * fresh)


# -- its times --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_every_level_that_the_student_is_drawn_at_is_one_of_the_grids(case: Case, steps: int) -> None:
    world = World(case)
    recipe = recipe_of(world, steps)
    levels = method.Grid(recipe, PARTS).levels(world.schedule)
    assert len(levels) == steps * PARTS + 1 and bool((levels[1:] < levels[:-1]).all()) and float(levels[-1]) == 0
    torch.testing.assert_close(levels[:-1:PARTS], recipe.levels(world.schedule), rtol=0, atol=0)
    told = world.schedule.time_of_sigma(levels[:-1])
    torch.testing.assert_close(world.schedule.sigma_of_time(told), levels[:-1])


def check_trips(module: ModuleType) -> None:
    world = World(CASES[2])
    grid, u = module.Grid(recipe_of(world, 4), 3), torch.arange(12, dtype=torch.float64) / 12
    levels, batch = grid.levels(world.schedule), world.batch(cond=world.cond[torch.arange(12) % 4])
    plain = grid(world.schedule, batch, u)
    assert torch.equal(plain.t, levels[:12]) and torch.equal(plain.r, levels[1:]) and not plain.s.any()
    phased = replace(grid, end=module.PhaseEnd(4), stride=2)(world.schedule, batch, u)
    assert torch.equal(phased.s, levels[torch.tensor([3] * 3 + [6] * 3 + [9] * 3 + [12] * 3)])
    # two levels on, and never beyond the end
    assert torch.equal(phased.r, levels[torch.tensor([2, 3, 3, 5, 6, 6, 8, 9, 9, 11, 12, 12])])
    found = {
        tuple(replace(grid, end=module.anywhere_below)(world.schedule, world.batch(step=step), u[:4]).s.tolist())
        for step in range(400)
    }
    ends = [sorted({ends[row] for ends in found}) for row in range(4)]
    assert ends == [sorted(levels[row + 1 :].tolist()) for row in range(4)]


def test_trips_end_where_they_should() -> None:
    check_trips(method)


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_times_of_consistency_training(case: Case) -> None:
    """ln t ~ N(-1.1, 2^2) up to the highest; r below it as ECT says, and nearer in each stage; on iCT's grid neighbours
    of Karras' spacing."""
    world, u = World(case), torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    batch = world.batch()
    for stage in (0, 3, 7):
        span = near.NearTimes(1e-4, 20.0, stage)(world.schedule, batch, u)
        t, r = (sigma.numpy() / ratios(world, sigma.numpy()) for sigma in (span.t, span.r))
        wanted = t * np.maximum(0, 1 - (1 + 8 / (1 + np.exp(t))) / 2 ** (stage + 1))
        np.testing.assert_allclose(r, wanted, rtol=1e-6, atol=1e-9)
        assert t.max() < 20 and np.all(t > r)
    below = t[t < np.exp(-1.1)].size / t.size
    # half of the whole normal, of which so much lies below ln 20
    assert below == pytest.approx(0.5 / 0.9797, abs=2e-3)
    karras = near.KarrasTimes(0.03, 20.0, 11)
    span = karras(world.schedule, batch, u)
    grid = (0.03 ** (1 / 7) + np.linspace(0, 1, 11) * (20 ** (1 / 7) - 0.03 ** (1 / 7))) ** 7
    t, r = (sigma.numpy() / ratios(world, sigma.numpy()) for sigma in (span.t, span.r))
    at = np.searchsorted(grid, t - 1e-6)
    np.testing.assert_allclose(t, grid[at], rtol=1e-6)
    np.testing.assert_allclose(r, grid[at - 1], rtol=1e-6)
    assert set(at) == set(range(1, 11))


@pytest.mark.parametrize("name", ["ict", "ect"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_near_times_are_told_apart(name: str, prediction: str, tmp_path: Path) -> None:
    """Of a model of 1000 indices too: the two answers of a sample are never asked at one time."""
    host = SmallHost(prediction)
    settings = small(method=name, batch=64, pairs=64, **{"stages": 1, "gap_base": 900.0} if name == "ect" else {})
    setup = setup_of(host, settings, tmp_path)
    add_student(host, settings, None)
    turn, told = METHODS[name].plan(setup).phases[0].turns[0], []
    batch = setup.prompts.batch(5, range(64))
    with host.denoiser.roles.installed():
        turn.loss(batch, 1.0, 3)
        hook = host.network.register_forward_pre_hook(lambda network, given: told.append(given[1]))
        turn.loss(batch, 1.0, 3)
        hook.remove()
    r, t = told
    assert bool((t > r).all())


# -- what becomes what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_what_becomes_what(prediction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pcm with one phase is lcm without its skip scalings, tscd and scott with one segment and one plain step too; tcd
    is when it is asked for the picture; tscd with as many segments as the student has steps is pcm."""
    dcm = loss_of("dcm", tmp_path, prediction)
    assert dcm > 0
    assert loss_of("pcm", tmp_path, prediction) == dcm
    assert loss_of("tscd", tmp_path, prediction, segments="1") == dcm
    assert loss_of("scott", tmp_path, prediction, stride=1, solver_noise=0.0) == dcm
    assert loss_of("scott", tmp_path / "2", prediction, stride=2, solver_noise=0.0) != dcm
    four = {"student_steps": 4, "solver_steps": 16}
    pcm = loss_of("pcm", tmp_path / "4", prediction, **four)
    assert loss_of("tscd", tmp_path / "4", prediction, segments="4", **four) == pcm != dcm
    assert loss_of("lcm", tmp_path, prediction) == pytest.approx(dcm, rel=0.01)
    with monkeypatch.context() as patch:
        patch.setattr(lcm, "with_skip", method.jump)
        assert loss_of("lcm", tmp_path / "no skip", prediction) == dcm
        patch.setattr(tcd, "anywhere_below", method.to_the_picture)
        assert loss_of("tcd", tmp_path, prediction) == dcm


def test_the_skip_scalings_are_those_of_lcm() -> None:
    """c_skip = 0.25 / ((10 t)^2 + 0.25), c_out = 10 t / sqrt((10 t)^2 + 0.25), t from 0 to 999."""
    world = World(CASES[2])
    times = torch.tensor([0.0, 1.0, 19.0, 999.0], dtype=torch.float64)
    x, x0 = drawn(seed=1), drawn(seed=2)
    found = lcm.with_skip(world.schedule, x, x0, world.schedule.sigma_of_time(times), torch.zeros(4))
    t = 10 * times.numpy()[:, None]
    wanted = 0.25 / (t**2 + 0.25) * rows(x) + t / np.sqrt(t**2 + 0.25) * rows(x0)
    np.testing.assert_allclose(rows(found), wanted, rtol=1e-12)
    np.testing.assert_allclose(rows(found)[0], rows(x)[0])


@pytest.mark.parametrize("case", WORLDS[:1] + WORLDS[2:5:2], ids=str)
def test_the_teachers_states_are_on_its_trajectory(case: Case, tmp_path: Path) -> None:
    """Where mlcm's student looks: state i is where i of the teacher's guided steps lead from unit noise, and its time
    is that of level i of the grid's every so many."""
    host = SmallHost({"eps": "epsilon", "v": "v_prediction", "flow": "flow"}[case.answers])
    settings = small(method="mlcm", segments="2", solver_steps=12, teacher_steps=5, states=2, student_steps=2)
    setup = setup_of(host, settings, tmp_path)
    grid = grid_of(setup, 2)
    source = mlcm.on_trajectories(setup, grid, 3.0)
    assert (source.every, source.count, len(source.rollouts.levels)) == (2, 12, 7)
    levels = grid.levels(host.denoiser.schedule)
    seen = set()
    for update in range(4):
        drawn, start = source(setup.prompts.batch(update, range(4)), update)
        span = grid(host.denoiser.schedule, drawn, start.u)
        noise = source.rollouts._noise(update % source.rollouts.blocks) if update < 2 else None
        at = [int((levels == t).nonzero()) for t in span.t]
        assert all(index % 2 == 0 for index in at)
        seen |= set(at)
        if noise is None:
            continue
        with torch.no_grad():
            every = [(x, sigma) for x, sigma, _ in walked(host, drawn, noise, levels[::2], 3.0)]
        for row, index in enumerate(at):
            torch.testing.assert_close(start.at(host.denoiser.schedule, span.t)[row], every[index // 2][0][row])
    assert len(seen) > 3


def walked(host: Any, batch: Any, noise: torch.Tensor, levels: torch.Tensor, w: float) -> Any:
    """(x, sigma, x0) at each level of the guided teacher, one step after another."""
    x = noise
    for sigma, lower in pairwise(levels):
        here = sigma.expand(len(x))
        d_c, d_u = (host.denoiser(x, here, cond) for cond in (batch.cond, batch.nulls()))
        x0 = d_u + w * (d_c - d_u)
        yield x, sigma, x0
        alpha, below = (float(host.denoiser.schedule.alpha(level)) for level in (sigma, lower))
        x = below * x0 + float(lower) / float(sigma) * (x - alpha * x0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_mlcm_on_pictures_is_pcm(prediction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = {"student_steps": 4, "solver_steps": 16}
    pcm = loss_of("pcm", tmp_path, prediction, **several)
    assert loss_of("mlcm", tmp_path / "own", prediction, segments="4", **several) != pcm

    def pictures(setup: Any, grid: Any, guidance: float) -> Any:
        pairs = Pairs(setup.host, setup.prompts, setup.settings, tmp_path / "pcm" / "pairs")
        return OnPictures(Pictures(None, pairs), pairs)

    monkeypatch.setattr(mlcm, "on_trajectories", pictures)
    assert loss_of("mlcm", tmp_path, prediction, segments="4", **several) == pcm


@dataclass(frozen=True)
class OnPictures:
    """What mlcm asks of its source, of pictures."""

    source: Pictures
    rollouts: Pairs

    def __call__(self, batch: Any, update: int) -> Any:
        return self.source(batch, update)


# -- wrong formulas ---------------------------------------------------------------------------------------------------

MUTANTS: dict[str, tuple[str, str]] = {
    "target from the teacher": ("with denoise.roles.use(STUDENT):", "with denoise.roles.use(TEACHER):"),
    "solver by the student": ("with denoise.roles.use(self.role):", "with denoise.roles.use(STUDENT):"),
    "the target one step too far": ("target = torch.where(expand(span.r > span.s, x_r) > 0, target, x_r)", "pass"),
    "no guidance": ("batch.nulls(), w)", "batch.nulls(), 1.0)"),
    "a mean for a sum": (
        "return pseudo_huber(answer, target, self.c).flatten(1).sum(1)",
        "return pseudo_huber(answer, target, self.c).flatten(1).mean(1)",
    ),
    "s above r": ("(last + 1 - after)).floor().long()", "(last - after)).floor().long()"),
    "beyond the phase": ("torch.minimum(after, end)", "after"),
    "a phase too long": ("(at // length + 1) * length", "(at // length + 2).clamp_max(self.phases) * length"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_loss_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.trajectory", *change, monkeypatch)

    def every(mutated: ModuleType) -> None:
        check_trips(mutated)
        for name in ENDS:
            check(mutated, CASES[2], name)

    must_fail(every, module)
