"""Decoupled DMD: its terms at levels of their own, the guidance term's below where the step begins; else it is dmd."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from narrowed import narrowed
from oracles import CASES, Case, World, drawn, rows, stable_diffusion_levels
from small_host import SmallHost, small
from whole_runs import factors, run

from onestep.core.recipe import Recipe
from onestep.training.engine.levels import UniformTime
from onestep.training.engine.student import BackwardSimulation, Drawn
from onestep.training.methods import METHODS, settings_for
from onestep.training.methods import decoupled_dmd as method
from onestep.training.methods.dmd import dmd

THREE = [CASES[0], CASES[2], CASES[4]]
"""eps, v and flow."""
LOW, HIGH, K = 0.05, 0.95, 3.0


def at_share(case: Case, share: float) -> tuple[float, float]:
    """(alpha, sigma) at a share of the network's time."""
    return (1 - share, share) if "flow" in case.name else stable_diffusion_levels(round(share * 999))


def step_at(world: World, share: float) -> Drawn:
    x, sigma = drawn(), torch.full((4,), at_share(world.case, share)[1], dtype=torch.float64)
    return Drawn(x, x, sigma, 0 * sigma, 1)


def check(module: ModuleType, case: Case, share: float) -> None:
    """Matching at a level uniform in [0.05, 0.95], guidance at one uniform in [0.05, min(0.95, where the step begins)];
    each with its own noise and weight."""
    world, x = World(case), drawn()
    told = {"matching_guidance": K, "matching_weight": 0.5, "level_low": LOW, "level_high": HIGH}
    made = module.cleaner(dmd(settings_for("decoupled-dmd", **told)), world.schedule, step_at(world, share))
    found, _ = made.cotangent(world.denoise, world.batch(), x)
    wanted = np.zeros_like(rows(x))
    for term, top in (("match", HIGH), ("guide", min(HIGH, share))):
        u = world.batch().uniform(f"{term} level").numpy()
        pairs = np.array([at_share(case, LOW + (top - LOW) * one) for one in u])
        alpha, sigma = pairs[:, :1], pairs[:, 1:]
        x_s = alpha * rows(x) + sigma * rows(world.batch().normal(f"{term} noise"))
        d_c, d_f = (world.x0(role, x_s, world.cond, alpha, sigma) for role in ("teacher", "critic"))
        d_u = world.x0("teacher", x_s, world.null.repeat(4), alpha, sigma)
        real = d_c if term == "match" else d_u + K * (d_c - d_u)
        weight = 1 / np.abs(rows(x) - real).mean(1, keepdims=True)
        wanted += weight * (0.5 * (d_f - d_c) if term == "match" else -(K - 1) * (d_c - d_u))
    np.testing.assert_allclose(rows(found), wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("share", [1.0, 0.749, 0.25])
@pytest.mark.parametrize("case", THREE, ids=str)
def test_guidance_looks_below_where_the_step_begins(case: Case, share: float) -> None:
    share = share if "flow" in case.name else round(share * 999) / 999
    check(method, case, share)


@pytest.mark.parametrize("case", THREE, ids=str)
def test_a_step_below_all_levels_still_has_some(case: Case) -> None:
    world = World(case)
    made = method.cleaner(dmd(settings_for("decoupled-dmd", level_low=0.5)), world.schedule, step_at(world, 0.3))
    assert made.levels == UniformTime(0.5, 0.98) and isinstance(made.guidance_levels, UniformTime)
    assert made.guidance_levels.low == 0 and made.guidance_levels.high == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("case", THREE, ids=str)
def test_the_steps_of_a_student_are_bounded_each_by_its_own(case: Case) -> None:
    world = World(case)
    recipe = Recipe.for_student(world.schedule, 4, "unet", ())
    simulate, tops = BackwardSimulation(world.denoise, recipe), {}
    for at in range(40):
        found = simulate(world.batch(step=at))
        made = method.cleaner(dmd(settings_for("decoupled-dmd")), world.schedule, found)
        tops[found.step] = made.guidance_levels.high  # type: ignore[union-attr]
    assert sorted(tops) == [0, 1, 2, 3]
    assert [tops[step] for step in range(4)] == pytest.approx([0.98, 0.75, 0.5, 0.25], abs=2e-3)


def test_where_critic_and_teacher_agree_guidance_alone_is_left() -> None:
    world, x = World(CASES[4]), drawn()
    for _, b in world.roles.state("critic").values():
        b.zero_()
    made = method.cleaner(
        dmd(settings_for("decoupled-dmd", matching_guidance=1.0)), world.schedule, step_at(world, 0.5)
    )
    found, _ = made.cotangent(world.denoise, world.batch(), x)
    assert float(found.abs().max()) <= 1e-12


@pytest.mark.parametrize("prediction", narrowed(["epsilon", "v_prediction", "flow"], "flow"))
def test_without_levels_of_their_own_it_is_dmd(prediction: str, tmp_path: Path) -> None:
    """To the bit; and where a student has one step from pure noise it is dmd with separate levels."""
    one_step = {"student_steps": 1, "start": 1.0, "steps": 2, "warm_start": 1}
    found = {}
    for name, told in (
        ("dmd", {"method": "dmd", "student_steps": 2, "steps": 2}),
        ("off", {"method": "decoupled-dmd", "separate_levels": False, "student_steps": 2, "steps": 2}),
        ("dmd apart", {"method": "dmd", "separate_levels": True, **one_step}),
        ("apart", {"method": "decoupled-dmd", **one_step}),
        ("two", {"method": "decoupled-dmd", "student_steps": 2, "steps": 2}),
    ):
        found[name] = factors(run(tmp_path / name, small(**told), host=SmallHost(prediction)).path)
    assert found["dmd"] == found["off"] != found["two"]
    assert found["dmd apart"] == found["apart"]
    assert METHODS["decoupled-dmd"].settings().separate_levels


MUTANTS = {
    "above the step": ("cut(objective.guidance_levels, 0.0, begins)", "cut(objective.guidance_levels, begins, 1.0)"),
    "where the step ends": ("drawn.sigma[:1]", "drawn.lower[:1]"),
    "all levels": ("cut(objective.guidance_levels, 0.0, begins)", "objective.guidance_levels"),
    "matching too": ("guidance_levels=cut(", "levels=cut("),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_wrong_levels_are_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.decoupled_dmd", *change, monkeypatch)
    must_fail(lambda wrong: check(wrong, CASES[4], 0.5), module)
