"""DMD as its settings make it: levels, weight, separate levels, and updates that bring a student to its teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import CASES, Case, World, drawn, levels_in_numpy, rows

from onestep.core.recipe import Recipe
from onestep.training.engine.levels import UniformTime
from onestep.training.engine.student import generate
from onestep.training.methods import settings_for
from onestep.training.methods.distribution_matching import DistributionMatching, dmd_weight
from onestep.training.methods.dmd import dmd

FLOW_AT_ONE, ZERO_TERMINAL = CASES[5], CASES[6]


def test_the_settings_reach_the_objective() -> None:
    made = dmd(settings_for(matching_guidance=3.0, matching_weight=0.5, level_low=0.1, level_high=0.7))
    assert made == DistributionMatching(
        guidance=3.0, matching=0.5, levels=UniformTime(0.1, 0.7), guidance_levels=None, weight=dmd_weight
    )
    assert made.critic_guidance == 1 and made.null_rate == 0 and made.critic_levels == UniformTime(0, 1)
    apart = dmd(settings_for(separate_levels=True, level_low=0.1, level_high=0.7))
    assert apart.guidance_levels == apart.levels


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("separate", [False, True])
def test_the_loss_of_the_paper_at_its_own_levels(case: Case, separate: bool) -> None:
    """Each sample at the level that its draw gives it; the guidance term at another one where they are separate."""
    world, x, k = World(case), drawn(), 2.0
    g, _ = dmd(settings_for(matching_guidance=k, separate_levels=separate)).cotangent(world.denoise, world.batch(), x)
    wanted = np.zeros_like(rows(x))
    for term in ("match", "guide"):
        stream = term if separate else "match"
        alpha, sigma = levels_in_numpy(case, world.batch().uniform(f"{stream} level").numpy())
        x_s = alpha * rows(x) + sigma * rows(world.batch().normal(f"{stream} noise"))
        d_c, d_f = (world.x0(role, x_s, world.cond, alpha, sigma) for role in ("teacher", "critic"))
        d_u = world.x0("teacher", x_s, world.null.repeat(4), alpha, sigma)
        real = d_c if separate and term == "match" else d_u + k * (d_c - d_u)
        weight = 1 / np.abs(rows(x) - real).mean(1, keepdims=True)
        wanted += weight * ((d_f - d_c) if term == "match" else -(k - 1) * (d_c - d_u))
    np.testing.assert_allclose(rows(g), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", [FLOW_AT_ONE, ZERO_TERMINAL], ids=str)
def test_an_update_brings_the_student_to_its_teacher(case: Case) -> None:
    """From pure noise a student's picture is its mean. <x, sg(G)>.backward() and descent lower |m_s - m_t|, with an
    exact critic (it follows the student, IDA at weight 1): the divergence of what they draw, at every level."""
    world = World(case)
    world.roles.copy("student", "critic")
    recipe = Recipe.for_student(world.schedule, 1, "unet", ())
    objective = dmd(settings_for(matching_guidance=1.0))
    gaps = []
    for step in range(40):
        batch = world.batch(step=step)
        x = generate(world.denoise, recipe, batch)
        gaps.append(float(np.square(world.mean("student", world.cond) - world.mean("teacher", world.cond)).sum()))
        g, _ = objective.cotangent(world.denoise, batch, x)
        x.backward(g / len(batch))
        for factor in world.roles.parameters("student"):
            assert factor.grad is not None
            factor.detach().sub_(0.05 * factor.grad)
            factor.grad = None
        world.roles.lerp("critic", "student", 1.0)
    assert all(later < earlier for earlier, later in zip(gaps[:8], gaps[1:8], strict=False))
    assert gaps[-1] < 0.02 * gaps[0]


def test_the_students_gradient_is_the_chain_rule() -> None:
    """From t = 1, x = (W + B A) c: <x, sg(G)>.backward() gives dB = (G^T c) A^T and dA = B^T (G^T c)."""
    world = World(FLOW_AT_ONE)
    recipe = Recipe.for_student(world.schedule, 1, "sd3", ())
    x = generate(world.denoise, recipe, world.batch())
    np.testing.assert_allclose(rows(x), world.mean("student", world.cond), atol=1e-12)
    g, _ = dmd(settings_for(matching_guidance=2.0)).cotangent(world.denoise, world.batch(), x)
    x.backward(g)
    a, b = world.roles.parameters("student")
    outer = rows(g).T @ world.cond.text[:, 0].double().numpy()
    assert a.grad is not None and b.grad is not None
    np.testing.assert_allclose(b.grad.numpy(), outer @ a.detach().double().numpy().T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(a.grad.numpy(), b.detach().double().numpy().T @ outer, rtol=1e-5, atol=1e-6)
    assert all(factor.grad is None for factor in world.roles.parameters("critic"))


def test_the_levels_are_drawn_within_their_range() -> None:
    world = World(CASES[0])
    objective = dmd(settings_for(level_low=0.3, level_high=0.4, matching_guidance=1.0))
    for step in range(20):
        _, scores = objective.cotangent(world.denoise, world.batch(step=step), drawn())
        times = world.schedule.time_of_sigma(scores.sigma)
        assert float(times.min()) >= 299 and float(times.max()) <= 400
    assert torch.unique(scores.sigma).numel() == 4
