"""TDM: a step matched in its own sub-interval, by a kernel that begins at its end; of one step it is dmd."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from narrowed import narrowed
from oracles import CASES, Case, World, drawn, rows
from small_host import SmallHost, small
from whole_runs import Cancelled, at_call, factors, left, run

from onestep.core.recipe import Recipe
from onestep.core.schedule import FlowSchedule, NoiseSchedule, VPSchedule
from onestep.training.engine.levels import UniformTime
from onestep.training.engine.student import Drawn
from onestep.training.methods import settings_for, sub_interval
from onestep.training.methods.distribution_matching import DistributionMatching
from onestep.training.methods.dmd import dmd
from onestep.training.methods.sub_interval import SubInterval

THREE = [CASES[0], CASES[2], CASES[4]]
"""eps, v and flow."""


def level(case: Case, share: float) -> tuple[float, float]:
    """(alpha, sigma) at a share of the network's time."""
    from oracles import stable_diffusion_levels

    return (1 - share, share) if "flow" in case.name else stable_diffusion_levels(round(share * 999))


def step_of(world: World, start: float, end: float, step: int = 1) -> Drawn:
    sigma, lower = (world.schedule.sigma_at(torch.full((4,), at, dtype=torch.float64)) for at in (start, end))
    x = drawn(seed=3)
    with world.roles.use("student"):
        x0 = world.denoise(x, sigma, world.cond)
    return Drawn(x0, x, sigma, lower if end else torch.zeros_like(lower), step)


# -- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [VPSchedule.scaled_linear(), FlowSchedule(3.0)], ids=["vp", "flow"])
def test_the_kernel_has_its_mean_and_its_variance(schedule: NoiseSchedule) -> None:
    """Of x_mid = a_m x0 + s_m e with plain noise e it makes the marginal of the higher level: a_t x0 + s_t n."""
    count = 40_000
    draw = torch.Generator().manual_seed(0)
    lower, sigma = (schedule.sigma_at(torch.full((count,), at, dtype=torch.float64)) for at in (0.3, 0.6))
    x0 = torch.full((count, 1), 1.7, dtype=torch.float64)
    e, n = (torch.randn(count, 1, generator=draw, dtype=torch.float64) for _ in range(2))
    x_mid = schedule.alpha(lower)[:, None] * x0 + lower[:, None] * e
    x_t = sub_interval.FromStepEnd(x_mid, lower)(schedule, x0, n, sigma)
    alpha, spread = float(schedule.alpha(sigma)[0]), float(sigma[0])
    assert abs(float(x_t.mean()) - alpha * 1.7) < 4 * spread / np.sqrt(count)
    assert abs(float(x_t.std()) / spread - 1) < 4 / np.sqrt(2 * count)
    # and at the step's own end nothing is added
    torch.testing.assert_close(sub_interval.FromStepEnd(x_mid, lower)(schedule, x0, n, lower), x_mid)


def check_scores(module: ModuleType, case: Case) -> None:
    """G at x_t = (a_t / a_mid) x_mid + sqrt(s_t^2 - (a_t s_mid / a_mid)^2) n, x_mid the end of the student's own step;
    the critic there, against x0, by its importance. In NumPy."""
    world, step = World(case), step_of(World(case), 0.7, 0.3)
    batch = world.batch()
    objective = module.SubInterval()(dmd(settings_for(matching_guidance=2.0)), world.schedule, step)
    g, _ = objective.cotangent(world.denoise, batch, step.x0)
    (a_k, s_k), (a_m, s_m) = level(case, 0.7), level(case, 0.3)
    x0 = world.x0("student", rows(step.x), world.cond, a_k, s_k)
    x_mid = a_m * x0 + s_m * (rows(step.x) - a_k * x0) / s_k

    def kernel(u: torch.Tensor, low: float, high: float, noise: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        table = [level(case, low + (high - low) * float(share)) for share in u]
        alpha, sigma = (np.array([pair[at] for pair in table])[:, None] for at in (0, 1))
        spread = np.sqrt(np.maximum(sigma**2 - (alpha * s_m / a_m) ** 2, 0))
        return alpha, sigma, alpha / a_m * x_mid + spread * rows(batch.normal(noise))

    low, high = (0.3, 0.7) if "flow" in case.name else (300 / 999, 699 / 999)
    alpha, sigma, x_t = kernel(batch.uniform("match level"), low, high, "match noise")
    d_c, d_u = (world.x0("teacher", x_t, cond, alpha, sigma) for cond in (world.cond, world.null.repeat(4)))
    d_f = world.x0("critic", x_t, world.cond, alpha, sigma)
    weight = 1 / np.abs(x0 - d_u - 2 * (d_c - d_u)).mean(1, keepdims=True)
    np.testing.assert_allclose(rows(g), weight * (d_f - d_c - (d_c - d_u)), rtol=1e-6, atol=1e-8)

    loss = float(objective.critic_loss(world.denoise, batch, step.x0).detach())
    alpha, sigma, x_t = kernel(batch.uniform("critic level"), low, high, "critic noise")
    held, noise = (x_t - alpha * x0) / sigma, rows(batch.normal("critic noise"))
    ratio = np.exp(-0.5 * (held**2).mean(1)) / np.exp(-0.5 * (noise**2).mean(1))
    error = ((world.x0("critic", x_t, world.cond, alpha, sigma) - x0) ** 2).mean(1)
    assert loss == pytest.approx(float((ratio * (1 + (alpha / sigma)[:, 0] ** 2) * error).mean()), rel=1e-6)
    assert len(np.unique(np.round(ratio, 6))) == 4


@pytest.mark.parametrize("case", THREE, ids=str)
def test_a_step_is_matched_from_its_end(case: Case) -> None:
    check_scores(sub_interval, case)


MUTANTS = {
    "plain noise on x0": (
        "return replace(changed, renoise=FromStepEnd(x_mid, drawn.lower), ",
        "return replace(changed, ",
    ),
    "no importance": (", importance=importance)", ")"),
    "the importance upside down": ("noise.square() - held.square()", "held.square() - noise.square()"),
    "twice the exponent": ("torch.exp(0.5 *", "torch.exp("),
    "x at the step's start": ("diffuse(schedule, self.x_mid, noise", "diffuse(schedule, x, noise"),
    "down from the level above": (
        "drawn.x0.detach(), drawn.sigma, drawn.lower)",
        "drawn.x0.detach(), drawn.lower, drawn.sigma)",
    ),
    "to the top": ("top = self.whole or drawn.step == 0", "top = True"),
    "from the bottom": (
        "levels=cut(objective.levels, low, high),\n            critic",
        "levels=objective.levels,\n            critic",
    ),
    "the critic's levels": ("cut(objective.critic_levels, low, high)", "cut(objective.critic_levels, low, 1.0)"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_sub_interval_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.sub_interval", *change, monkeypatch)
    must_fail(lambda mutated: check_scores(mutated, CASES[4]), module)


@pytest.mark.parametrize("case", THREE, ids=str)
def test_where_critic_and_teacher_agree_nothing_is_left(case: Case) -> None:
    world = World(case)
    for _, b in world.roles.state("critic").values():
        b.zero_()
    for step in (step_of(world, 1.0, 0.7, 0), step_of(world, 0.7, 0.3, 1), step_of(world, 0.3, 0.0, 2)):
        objective = SubInterval()(dmd(settings_for(matching_guidance=1.0)), world.schedule, step)
        g, _ = objective.cotangent(world.denoise, world.batch(), step.x0)
        assert float(g.abs().max()) <= 1e-12


# -- which levels -----------------------------------------------------------------------------------------------------


def test_each_step_has_its_own_levels() -> None:
    """Disjoint, and together all of them; "above" from a step's end to the top."""
    world = World(CASES[4])
    plain = DistributionMatching(guidance_levels=UniformTime())
    steps = [(1.0, 0.7, 0), (0.7, 0.3, 1), (0.3, 0.0, 2)]
    found = [SubInterval()(plain, world.schedule, step_of(world, *step)) for step in steps]
    for name, least, most in (("levels", 0.02, 0.98), ("guidance_levels", 0.02, 0.98), ("critic_levels", 0.0, 1.0)):
        ends = [(getattr(one, name).low, getattr(one, name).high) for one in found]
        np.testing.assert_allclose(ends, [(0.7, most), (0.3, 0.7), (least, 0.3)], atol=1e-12)
    whole = SubInterval(whole=True)(plain, world.schedule, step_of(world, 0.7, 0.3, 1))
    assert (whole.levels.low, whole.levels.high) == (pytest.approx(0.3), 0.98)  # type: ignore[union-attr]
    # a range of the run's that does not meet the step's: the step's own
    far = DistributionMatching(levels=UniformTime(0.8, 0.9))
    assert SubInterval()(far, world.schedule, step_of(world, 0.7, 0.3, 1)).levels == UniformTime(
        pytest.approx(0.3), pytest.approx(0.7)
    )


def test_the_student_draws_along_its_own_trajectory() -> None:
    from onestep.training.methods.tdm import recipe

    for steps in (1, 4):
        made = recipe(SmallHost("flow"), settings_for("tdm", student_steps=steps, sizes="32x32"))
        assert isinstance(made, Recipe) and made.steps == steps and not made.renoise and made.eta == 0


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("start", narrowed([1.0, 0.6], 0.6))
def test_of_one_step_it_is_dmd(prediction: str, start: float, tmp_path: Path) -> None:
    """To the bit, at dmd's weight of the critic."""
    told = {"student_steps": 1, "anchor": 0.2, "steps": 3, "start": start}
    one = run(tmp_path / "dmd", small(**told), host=SmallHost(prediction))
    other = run(tmp_path / "tdm", small(method="tdm", critic_weight="v", **told), host=SmallHost(prediction))
    assert factors(one.path) == factors(other.path)


@pytest.mark.parametrize("prediction", narrowed(["epsilon", "v_prediction", "flow"], "epsilon"))
def test_a_run_that_is_stopped_ends_as_if_not(prediction: str, tmp_path: Path) -> None:
    settings = small(method="tdm", student_steps=3, critic_pictures="shared", separate_levels=True)
    result = run(tmp_path / "whole" / "run", settings, host=SmallHost(prediction))
    assert not result.recipe.renoise
    with pytest.raises(Cancelled):
        run(tmp_path / "cut" / "run", settings, host=SmallHost(prediction, on_poll=at_call(23, Cancelled())))
    run(tmp_path / "cut" / "run", settings, host=SmallHost(prediction), existing="continue")
    whole, cut = left(tmp_path / "whole" / "run"), left(tmp_path / "cut" / "run")
    assert whole["files"] == cut["files"] and whole["metrics"] == cut["metrics"]
