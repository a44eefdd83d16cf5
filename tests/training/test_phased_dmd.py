"""Phased DMD: its critic's exact target, its phases one after the other, and whole runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from allocated import training
from flops import ONE_FLOP_A_SECOND, flops_of
from mutations import must_fail, mutant
from narrowed import narrowed
from oracles import CASES, Case, World, drawn, rows, stable_diffusion_levels
from small_host import SmallHost, small
from tiny_pipelines import make
from whole_runs import cancelled_and_whole, run

from onestep.core.errors import OneStepError
from onestep.core.sampling import diffuse
from onestep.core.schedule import FlowSchedule, NoiseSchedule, VPSchedule, add_noise
from onestep.pipelines.adapt import adapt
from onestep.pipelines.shells import of_host
from onestep.training.engine.levels import WEIGHTS
from onestep.training.engine.student import Drawn
from onestep.training.methods import METHODS, phased_dmd, settings_for
from onestep.training.methods.dmd import dmd
from onestep.training.methods.sub_interval import FromStepEnd
from onestep.training.plan.rungs import Way, rung_of

THREE = [CASES[0], CASES[2], CASES[4]]
"""eps, v and flow."""
LAST = [CASES[1], CASES[5], CASES[6]]
"""To where alpha is 0.07 and 0."""
TOLD: dict[str, Any] = {"method": "phased-dmd", "student_steps": 3, "steps": 6}


def level(case: Case, share: float) -> tuple[float, float]:
    """(alpha, sigma) at a share of the network's time."""
    if "flow" in case.name:
        shift = 3 if "t = 1" in case.name else 1
        sigma = shift * share / (1 + (shift - 1) * share)
        return 1 - sigma, sigma
    return stable_diffusion_levels(round(share * 999), zero_terminal="zero" in case.name)


def step_of(world: World, start: float, end: float, step: int = 1) -> Drawn:
    sigma, lower = (world.schedule.sigma_at(torch.full((4,), at, dtype=torch.float64)) for at in (start, end))
    x = drawn(seed=3)
    with world.roles.use("student"):
        x0 = world.denoise(x, sigma, world.cond)
    return Drawn(x0, x, sigma, lower if end else torch.zeros_like(lower), step)


# -- the critic's target ----------------------------------------------------------------------------------------------


def check_critic(module: ModuleType, case: Case) -> None:
    """b_{t|s}^2 |(a_t D - x_t) / b_t^2 + n / b_{t|s}|^2 at levels from the step's end to the top, in NumPy as the
    paper has it, for what the student's own step ends in."""
    world = World(case)
    step, batch = step_of(world, 0.7, 0.3), world.batch()
    objective = module.InPhase()(dmd(settings_for()), world.schedule, step)
    objective = phased_dmd.replace(objective, critic_weight=WEIGHTS["eps"])
    loss = float(objective.critic_loss(world.denoise, batch, step.x0).detach())
    (a_k, s_k), (a_s, b_s) = level(case, 0.7), level(case, 0.3)
    x0 = world.x0("student", rows(step.x), world.cond, a_k, s_k)
    x_s = a_s * x0 + b_s * (rows(step.x) - a_k * x0) / s_k
    low = 0.3 if "flow" in case.name else 300 / 999
    table = [level(case, low + (1 - low) * float(share)) for share in batch.uniform("critic level")]
    a_t, b_t = (np.array([pair[at] for pair in table])[:, None] for at in (0, 1))
    spread, noise = np.sqrt(b_t**2 - (a_t * b_s / a_s) ** 2), rows(batch.normal("critic noise"))
    x_t = a_t / a_s * x_s + spread * noise
    score = (a_t * world.x0("critic", x_t, world.cond, a_t, b_t) - x_t) / b_t**2
    assert loss == pytest.approx(float((spread**2 * (score + noise / spread) ** 2).mean()), rel=1e-6)


@pytest.mark.parametrize("case", THREE, ids=str)
def test_the_critic_learns_the_exact_conditional_score(case: Case) -> None:
    check_critic(phased_dmd, case)


MUTANTS = {
    "x0's error": ("importance=None, residual=Conditional(made.renoise))", "importance=None)"),
    "tdm's importance": ("replace(made, importance=None, residual", "replace(made, residual"),
    "its own interval alone": ("SubInterval(whole=True)", "SubInterval()"),
    "no noise": ("(a_s**2 * sigma), off) * noise", "(a_s**2 * sigma), off) * (0 * noise)"),
    "the noise's sign": (" * off + expand(", " * off - expand("),
    "the whole spread": ("expand(spread / sigma, off)", "expand(sigma / sigma, off)"),
    "x_s as x0": ("self.kernel.x_mid / expand(a_s, answer)", "self.kernel.x_mid"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_target_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.phased_dmd", *change, monkeypatch)
    must_fail(lambda mutated: check_critic(mutated, CASES[4]), module)


@pytest.mark.parametrize("schedule", [VPSchedule.scaled_linear(), FlowSchedule(3.0)], ids=["vp", "flow"])
def test_the_best_critic_is_the_one_of_what_the_student_makes(schedule: NoiseSchedule) -> None:
    """x_s ~ N(m, d^2), of no diffusion of any x0: the answer whose score is that of x_t's density has no less loss
    than any other of its kind, which the error against the student's x0 has not."""
    count, m, d = 200_000, 0.8, 0.5
    draw = torch.Generator().manual_seed(0)
    lower, sigma = (schedule.sigma_at(torch.full((count,), at, dtype=torch.float64)) for at in (0.3, 0.6))
    x_s, n = (torch.randn(count, 1, generator=draw, dtype=torch.float64) for _ in range(2))
    x_s = m + d * x_s
    kernel = FromStepEnd(x_s, lower)
    x_t = diffuse(schedule, x_s, n, lower, sigma)
    a_t, b_t, a_s = float(schedule.alpha(sigma[0])), float(sigma[0]), float(schedule.alpha(lower[0]))
    variance = (a_t / a_s * d) ** 2 + b_t**2 - (a_t * float(lower[0]) / a_s) ** 2
    score = -(x_t - a_t / a_s * m) / variance
    best = (x_t + b_t**2 * score) / a_t
    left = phased_dmd.Conditional(kernel)(schedule, best, n, sigma)
    # at the least loss what is left is as good as unrelated to anything that x_t tells
    for tells in (torch.ones_like(x_t), x_t, x_t**2):
        product = left * tells
        assert abs(float(product.mean())) < 4 * float(product.std()) / np.sqrt(count)
    off = phased_dmd.Conditional(kernel)(schedule, best + 0.05 * x_t, n, sigma) * x_t
    assert abs(float(off.mean())) > 4 * float(off.std()) / np.sqrt(count)


@pytest.mark.parametrize("case", LAST, ids=str)
def test_it_is_finite_from_its_end_to_pure_noise(case: Case) -> None:
    """At t = s nothing is left to learn; at alpha = 0 too, where the answer still counts."""
    world = World(case)
    step = step_of(world, 0.7, 0.3)
    residual = phased_dmd.InPhase()(dmd(settings_for()), world.schedule, step).residual
    assert residual is not None
    noise, answers = drawn(seed=8), [drawn(seed=9), drawn(seed=10)]
    ends = [residual(world.schedule, answer, noise, step.lower) for answer in answers]
    torch.testing.assert_close(ends[0], ends[1])
    top = world.schedule.sigma_at(torch.ones(4, dtype=torch.float64))
    tops = [residual(world.schedule, answer, noise, top) for answer in answers]
    assert all(bool(value.isfinite().all()) for value in (*ends, *tops)) and not torch.allclose(*tops)


@pytest.mark.parametrize("case", THREE, ids=str)
def test_the_last_phase_is_dmd_with_a_critic_of_the_noise(case: Case) -> None:
    world = World(case)
    step, batch = step_of(world, 0.3, 0.0, 2), world.batch()
    plain = dmd(settings_for(matching_guidance=2.0))
    made = phased_dmd.InPhase()(plain, world.schedule, step)
    assert made == plain
    # and the target at s = 0 is x0 itself
    kernel = FromStepEnd(step.x0, torch.zeros(4, dtype=torch.float64))
    sigma = world.schedule.sigma_at(torch.full((4,), 0.5, dtype=torch.float64))
    answer, noise = drawn(seed=8), drawn(seed=9)
    left = phased_dmd.Conditional(kernel)(world.schedule, answer, noise, sigma)
    torch.testing.assert_close(left, answer - step.x0)
    assert torch.equal(kernel(world.schedule, step.x0, noise, sigma), add_noise(world.schedule, step.x0, noise, sigma))
    assert float(made.critic_loss(world.denoise, batch, step.x0).detach()) > 0


@pytest.mark.parametrize("case", THREE, ids=str)
def test_where_critic_and_teacher_agree_nothing_is_left(case: Case) -> None:
    world = World(case)
    for _, b in world.roles.state("critic").values():
        b.zero_()
    for step in (step_of(world, 1.0, 0.7, 0), step_of(world, 0.7, 0.3, 1), step_of(world, 0.3, 0.0, 2)):
        objective = phased_dmd.InPhase()(dmd(settings_for(matching_guidance=1.0)), world.schedule, step)
        g, _ = objective.cotangent(world.denoise, world.batch(), step.x0)
        assert float(g.abs().max()) <= 1e-12


# -- its phases -------------------------------------------------------------------------------------------------------


def test_each_phase_learns_its_own_lora_alone(tmp_path: Path) -> None:
    """One after the other, and what was learnt before stays to the bit."""
    host, before, moved = SmallHost(), {}, {}

    def look(progress: Any) -> None:
        if progress.preparing or not progress.phase.startswith("phased-dmd"):
            return
        for step, role in enumerate(("student", "student@2", "student@3"), 1):
            now = [value.clone() for pair in host.denoiser.roles.state(role).values() for value in pair]
            if step in before and any(not torch.equal(a, b) for a, b in zip(now, before[step], strict=True)):
                moved.setdefault(progress.phase, set()).add(step)
            before[step] = now

    result = run(tmp_path / "run", small(**TOLD, anchor=0.5, warm_start=0, critic_warm_up=1), host=host, report=look)
    assert moved == {f"phased-dmd {step}": {step} for step in (1, 2, 3)}
    assert [line["phase"] for line in result.metrics if line["update"]] == [
        *("critic 1", "phased-dmd 1", "phased-dmd 1"),
        *("critic 2", "phased-dmd 2", "phased-dmd 2"),
        *("critic 3", "phased-dmd 3", "phased-dmd 3"),
    ]
    assert result.recipe.files == ("result.safetensors", "result-2.safetensors", "result-3.safetensors")
    assert not result.recipe.renoise


@pytest.mark.parametrize("poll", narrowed([9, 14, 17], 14))
@pytest.mark.parametrize("prediction", narrowed(["epsilon", "v_prediction", "flow"], "flow"))
def test_a_run_that_is_stopped_ends_as_if_not(prediction: str, poll: int, tmp_path: Path) -> None:
    cut, whole = cancelled_and_whole(tmp_path, small(**TOLD | {"steps": 3}, anchor=0.5, separate_levels=True), poll)
    assert cut["files"] == whole["files"] and cut["metrics"] == whole["metrics"]


def test_what_it_cannot_serve_is_refused() -> None:
    with pytest.raises(OneStepError, match="the student has one: set student_steps to 2 to 8, or choose dmd"):
        METHODS["phased-dmd"].check(SmallHost(), settings_for("phased-dmd", sizes="32x32"))
    with pytest.raises(OneStepError, match="steps is 3, and the student has 4 phases"):
        METHODS["phased-dmd"].check(SmallHost(), settings_for("phased-dmd", student_steps=4, steps=3, sizes="32x32"))
    for name in ("step_loras", "diversity_anchor", "follow"):
        with pytest.raises(OneStepError, match=f"phased-dmd has no setting '{name}': it belongs to dmd"):
            settings_for("phased-dmd", **{name: 1})


@pytest.mark.broad
def test_the_plan_counts_each_phase(tmp_path: Path) -> None:
    """As it is done, one update of each: a later phase has more steps before its own."""
    host = adapt(make("sd"))
    few: dict[str, Any] = {
        "sizes": "16x16",
        "rank": 4,
        "batch": 2,
        "pairs": 2,
        "steps": 6,
        "teacher_steps": 1,
        "watch_samples": 4,
    }
    own: dict[str, Any] = {"warm_start": 0, "critic_warm_up": 0, "critic_updates": 2, "student_steps": 3}
    settings = settings_for("phased-dmd", **few, **own)
    whole = rung_of(partial(of_host, host), settings, ONE_FLOP_A_SECOND, Way(settings.batch)).whole
    with training(host, settings, tmp_path) as step:
        step(0)  # whose data is made
        found = [flops_of(partial(step, at)) for at in range(1, 6)]
    counted = [whole.seconds[f"phased-dmd {phase}"] / 2 for phase in (1, 2, 3)]
    assert counted[0] < counted[1] < counted[2]
    assert found == pytest.approx([counted[0], counted[1], counted[1], counted[2], counted[2]], rel=1e-9)
