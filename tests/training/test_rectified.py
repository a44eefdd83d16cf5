"""Straight lines: the velocities' loss in closed form, on every kind of model, and what becomes what."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from oracles import CASES, TAU, Array, Case, World, drawn, rows
from small_host import SmallHost, setup_of, small
from trajectory_oracle import led, loss_of, ratios

from onestep.core.schedule import FlowSchedule
from onestep.training.engine.student import STUDENT
from onestep.training.methods import rectified as method
from onestep.training.methods.perflow import Windows
from onestep.training.methods.rfpp import TwoEnds
from onestep.training.methods.slimflow import Annealed
from onestep.training.methods.trajectory import Grid, TeacherSteps, square

WORLDS = [case for case in CASES if case.name != "x0"]
PREDICTIONS = ["epsilon", "v_prediction", "flow"]


def check(module: ModuleType, case: Case) -> None:
    """Of a line from y_1 at tau 0.8 to y_0 at tau 0.2: |(y - D) / tau - v|^2 and its gradient."""
    world, batch = World(case), World(case).batch()
    high, low = drawn(seed=1), drawn(seed=2)
    ends = torch.full((4,), 0.8, dtype=torch.float64), torch.full((4,), 0.2, dtype=torch.float64)
    loss = module.Straight(square, 0.7)(world.denoise, batch, module.Chord(high, low, *ends))
    loss.backward()
    told = 0.2 + 0.5 * batch.uniform("chord").numpy()
    sigma = levels(world, told)[:, None]
    alpha = ratios(world, sigma)
    tau = sigma / (alpha + sigma)
    # a trained time is near what was asked
    np.testing.assert_allclose(tau[:, 0], told, atol=2e-3)
    v = (rows(high) - rows(low)) / 0.6
    y = rows(low) + (tau - 0.2) * v
    error = (y - world.x0(STUDENT, (alpha + sigma) * y, world.cond, alpha, sigma)) / tau - v
    assert float(loss.detach()) == pytest.approx((error**2).sum(1).mean(), rel=1e-9)
    world.check_gradient(-2 * error / tau / 4 * sigma**2 / (alpha**2 * TAU**2 + sigma**2))


def levels(world: World, tau: Array) -> Array:
    """sigma at tau, the nearest that the network is told: a flow model's is tau itself."""
    if isinstance(world.schedule, FlowSchedule):
        return tau
    sigmas = world.schedule.sigma_of_time(torch.arange(1000.0)).numpy()
    angles = np.arctan2(sigmas, np.sqrt(1 - np.minimum(sigmas, 1) ** 2))
    return sigmas[np.abs(angles[None] - np.arctan2(tau, 1 - tau)[:, None]).argmin(1)]


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_the_loss_and_its_gradient_in_closed_form(case: Case) -> None:
    check(method, case)


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_a_step_is_straight_on_every_schedule(case: Case) -> None:
    """J in y moves along y - tau v, v = (y - D) / tau."""
    world = World(case)
    sigma, lower = (world.schedule.sigma_at(torch.full((4,), share, dtype=torch.float64)) for share in (0.8, 0.3))
    x, x0 = drawn(seed=1), drawn(seed=2)
    moved = led(world, rows(x), rows(x0), sigma.numpy()[:, None], lower.numpy()[:, None])
    y = method.straightened(world.schedule, x, sigma)
    tau, below = (method.noise_share(world.schedule, level) for level in (sigma, lower))
    velocity = (rows(y) - rows(x0)) / tau.numpy()[:, None]
    wanted = rows(y) + (below - tau).numpy()[:, None] * velocity
    found = method.straightened(world.schedule, torch.from_numpy(moved).reshape(x.shape), lower)
    np.testing.assert_allclose(rows(found), wanted, rtol=1e-9)


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_a_window_goes_from_a_noisy_picture_to_where_the_teacher_leads_it(case: Case, tmp_path: Path) -> None:
    host = SmallHost({"eps": "epsilon", "v": "v_prediction", "flow": "flow"}[case.answers])
    setup = setup_of(host, small(method="perflow", student_steps=3, solver_steps=2), tmp_path)
    schedule, recipe = host.denoiser.schedule, setup.recipe
    batch = setup.prompts.batch(1, range(4))
    x0 = batch.normal("pictures")
    chord = Windows(setup, Grid(recipe, 2), TeacherSteps(3.0, 3.0))(batch, x0)
    every = [*recipe.levels(schedule).tolist(), 0.0]
    noise, null = batch.normal("window noise"), batch.nulls()
    for row, window in enumerate((batch.uniform("window") * 3).floor().long().tolist()):
        top, bottom = every[window : window + 2]
        grid = Grid(recipe, 2).levels(schedule)[2 * window : 2 * window + 3].tolist()
        assert (grid[0], grid[2]) == (top, bottom)
        x = at = float(schedule.alpha(torch.tensor(top))) * x0[row : row + 1] + top * noise[row : row + 1]
        for sigma, lower in zip(grid[:-1], grid[1:], strict=True):
            here = torch.tensor([sigma], dtype=torch.float64)
            with torch.no_grad():
                d_c, d_u = (host.denoiser(x, here, cond[row : row + 1]) for cond in (batch.cond, null))
            d = d_u + 3 * (d_c - d_u)
            alpha, below = (float(schedule.alpha(torch.tensor(level, dtype=torch.float64))) for level in (sigma, lower))
            x = below * d + lower / sigma * (x - alpha * d)
        for found, state, level in ((chord.high, at, top), (chord.low, x, bottom)):
            scale = float(schedule.alpha(torch.tensor(level, dtype=torch.float64))) + level
            torch.testing.assert_close(found[row : row + 1], state / scale, rtol=1e-4, atol=1e-5)
        assert float(chord.tau_low[row]) == pytest.approx(bottom / scale) if bottom else float(chord.tau_low[row]) == 0


def test_rfpp_looks_at_both_ends() -> None:
    """Density e^(a t) + e^(a (1 - t)): its moments by quadrature; a = 0 is uniform."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = TwoEnds(4.0)(u).numpy()
    grid = (np.arange(100_000) + 0.5) / 100_000
    density = np.exp(4 * grid) + np.exp(4 * (1 - grid))
    for power in (1, 2, 4):
        assert (t**power).mean() == pytest.approx((grid**power * density).sum() / density.sum(), rel=1e-6)
    assert t.min() >= 0 and t.max() <= 1 and torch.equal(TwoEnds(0.0)(u), u)


def test_slimflows_noise_is_annealed() -> None:
    """Unit noise throughout: any at first, the teacher's own from the end of the annealing on."""
    batch, z = World(CASES[0]).batch(), drawn(seed=1)
    annealed = Annealed(0.5)
    assert torch.equal(annealed(batch, z, 0.0), batch.normal("annealed noise"))
    torch.testing.assert_close(annealed(batch, z, 0.2), 0.8 * z + 0.6 * batch.normal("annealed noise"))
    assert torch.equal(annealed(batch, z, 0.5), z) and torch.equal(Annealed(0.0)(batch, z, 0.0), z)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_becomes_what(prediction: str, tmp_path: Path) -> None:
    """rfpp without its extras and slimflow without annealing are reflow."""
    reflow = loss_of("reflow", tmp_path, prediction, number="reflow")
    assert loss_of("rfpp", tmp_path, prediction, number="reflow", ends=0.0, distance="l2") == reflow > 0
    assert loss_of("rfpp", tmp_path / "2", prediction, number="reflow", distance="l2") != reflow
    assert loss_of("slimflow", tmp_path, prediction, number="reflow", annealing=0.0) == reflow
    assert loss_of("slimflow", tmp_path / "2", prediction, number="reflow") != reflow


MUTANTS: dict[str, tuple[str, str]] = {
    "another coordinate": ("return sigma / (schedule.alpha(sigma) + sigma)", "return sigma"),
    "the velocity the other way": ("(self.high - self.low) / ", "(self.low - self.high) / "),
    "the line begins above": ("expand(tau - self.tau_low, self.low)", "expand(tau, self.low)"),
    "x0 for a velocity": ("velocity = (y - x0) / expand(tau, y)", "velocity = y - x0"),
    "unscaled": ("denoise(expand(schedule.alpha(sigma) + sigma, y) * y, ", "denoise(y, "),
    "the teacher taught": ("denoise.roles.use(STUDENT)", 'denoise.roles.use("teacher")'),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_loss_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.rectified", *change, monkeypatch)
    must_fail(lambda mutated: check(mutated, CASES[2]), module)
