"""DP-DMD's anchor: the first step's target in closed form, the teacher's way to it, and who is matched then."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from oracles import CASES, Case, World, drawn, rows, stable_diffusion_levels
from small_host import PROMPTS, SmallHost, setup_of, small

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.core.sampling import jump
from onestep.training.data.anchors import Anchors, anchor_levels
from onestep.training.engine.student import BackwardSimulation, add_student
from onestep.training.methods import METHODS, diversity_anchor, settings_for
from onestep.training.methods.diversity_anchor import DiversityAnchor

THREE = [CASES[0], CASES[2], CASES[4]]
"""eps, v and flow."""


def level(case: Case, share: float) -> tuple[float, float]:
    return (1 - share, share) if "flow" in case.name else stable_diffusion_levels(round(share * 999))


def check_loss(module: ModuleType, case: Case) -> None:
    """|D - D*|^2; of a flow model from t = 1 it is |v - v*|^2 with v* = (eps - z) / (1 - t_k), DP-DMD's own form. And
    its gradient: 2 (D - D*) dD/dmu."""
    world = World(case)
    recipe = Recipe.for_student(world.schedule, 4, "unet", ())
    noise, z, batch = drawn(seed=5), drawn(seed=6), world.batch()
    leaves = world.double_factors("student")
    loss = module.DiversityAnchor(recipe, 6)(world.denoise, batch, (noise, z))
    loss.backward()
    (a_1, s_1), (a_k, s_k) = level(case, 1.0), level(case, 0.5)
    x = np.sqrt(a_1**2 + s_1**2) * rows(noise)
    d = world.x0("student", x, world.cond, a_1, s_1)
    if "flow" in case.name:
        wanted = ((x - d) - (rows(noise) - rows(z)) / (1 - 0.5)) ** 2
        assert float(loss.detach()) == pytest.approx(wanted.sum(1).mean(), rel=1e-9)
    # the end of the step that D* makes is z
    best = (rows(z) - s_k / s_1 * x) / (a_k - s_k * a_1 / s_1)
    np.testing.assert_allclose(a_k * best + s_k * (x - a_1 * best) / s_1, rows(z), atol=1e-12)
    assert float(loss.detach()) == pytest.approx(((d - best) ** 2).sum(1).mean(), rel=1e-7)
    from oracles import TAU

    d_mean = 2 * (d - best) / 4 * s_1**2 / (a_1**2 * TAU**2 + s_1**2)
    outer = d_mean.T @ world.cond.text[:, 0].double().numpy()
    assert leaves[1].grad is not None
    np.testing.assert_allclose(leaves[1].grad.numpy(), outer @ leaves[0].detach().numpy().T, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", THREE, ids=str)
def test_the_first_steps_target(case: Case) -> None:
    check_loss(diversity_anchor, case)


MUTANTS = {
    "towards z itself": ("(x_k - expand(ratio, x) * x) / expand", "x_k / expand"),
    "the wrong end": ("levels[0], levels[-1])", "levels[0], levels[-2])"),
    "a mean over elements": ("flatten(1).sum(1).mean()", "flatten(1).mean(1).mean()"),
    "the teacher's answer": ("denoise.roles.use(STUDENT)", 'denoise.roles.use("critic")'),
    "the other ratio": ("lower / sigma", "sigma / lower"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_target_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.diversity_anchor", *change, monkeypatch)
    must_fail(lambda mutated: check_loss(mutated, CASES[4]), module)


@pytest.mark.parametrize("case", THREE, ids=str)
def test_a_student_that_goes_the_teachers_way_is_at_the_minimum(case: Case) -> None:
    """One step of the teacher: D* is its own guided answer, whatever it is."""
    world = World(case)
    recipe, noise = Recipe.for_student(world.schedule, 2, "unet", ()), drawn(seed=5)
    levels = anchor_levels(world.schedule, recipe, 1)
    sigma, lower = (at.expand(4) for at in levels)
    x = noise * (world.schedule.alpha(sigma) ** 2 + sigma**2).sqrt()[:, None, None, None]
    with world.roles.use("student"):
        z = jump(world.schedule, x, world.denoise(x, sigma, world.cond), sigma, lower)
    assert float(DiversityAnchor(recipe, 1)(world.denoise, world.batch(), (noise, z)).detach()) < 1e-12


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_the_teachers_way(prediction: str, tmp_path: Path) -> None:
    """K guided steps through half of the time, each row by hand; the same however it is sliced."""
    host, settings = SmallHost(prediction), small(student_steps=2, guidance=3.0, batch=4, pairs=8)
    setup = setup_of(host, settings, tmp_path)
    anchors = Anchors(host, setup.prompts, settings, tmp_path / "anchors", setup.recipe, 3)
    batch, (noise, found) = anchors.draw(setup.prompts.batch(0, range(4)), 1)
    schedule = host.denoiser.schedule
    shares = [1.0, 5 / 6, 4 / 6, 0.5]
    assert anchors.solve_cost == 6
    x = noise
    for here, there in zip(shares[:-1], shares[1:], strict=True):
        sigma, lower = (schedule.sigma_at(torch.full((4,), at, dtype=torch.float64)) for at in (here, there))
        d_c, d_u = (host.denoiser(x, sigma, cond) for cond in (batch.cond, batch.nulls()))
        d = d_u + 3.0 * (d_c - d_u)
        alpha, alpha_ = (schedule.alpha(at).float()[:, None, None, None] for at in (sigma, lower))
        s, s_ = (at.float()[:, None, None, None] for at in (sigma, lower))
        x = alpha_ * d + s_ * (x - alpha * d) / s
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    sliced = Anchors(host, setup.prompts, settings, tmp_path / "sliced", setup.recipe, 3)
    parts = [sliced.draw(setup.prompts.batch(0, [row]), 1)[1][1] for row in range(4)]
    torch.testing.assert_close(torch.cat(parts), found, rtol=1e-4, atol=1e-4)
    again, (_, later) = anchors.draw(setup.prompts.batch(7, range(4)), 9)
    assert later.shape == found.shape and len(again) == 4 and len(setup.prompts) == len(PROMPTS)


def test_the_matching_is_left_to_the_later_steps(tmp_path: Path) -> None:
    """And the anchor's gradient is that much of the loss beside the matching's."""
    host, settings = SmallHost("flow"), small(student_steps=4, diversity_anchor=0.05, diversity_steps=2)
    setup = setup_of(host, settings, tmp_path)
    steps = {
        BackwardSimulation(host.denoiser, setup.recipe, first=1)(setup.prompts.batch(key, [0]), role="teacher").step
        for key in range(40)
    }
    assert steps == {1, 2, 3}
    with ExitStack() as stack:
        add_student(host, settings, None)
        plan = METHODS["dmd"].plan(setup)
        stack.enter_context(host.denoiser.roles.installed())
        for _, b in host.denoiser.roles.state("student").values():
            b.add_(0.1)
        match, update = plan.phases[-1].turns[-1].loss, 5
        found = {}
        for weight in (0.0, 0.05):
            turns = match.__self__  # type: ignore[attr-defined]
            object.__setattr__(turns, "setup", setup_of(host, settings.with_(diversity_anchor=weight), tmp_path))
            for p in host.denoiser.roles.parameters("student"):
                p.grad = None
            match(setup.prompts.batch(20, range(4)), 1.0, update)
            found[weight] = [p.grad.clone() for p in host.denoiser.roles.parameters("student")]  # type: ignore[union-attr]
        anchors = Anchors(host, setup.prompts, settings, tmp_path / "anchors", setup.recipe, 2)
        batch, data = anchors.draw(setup.prompts.batch(20, range(4)), 0)
        loss = DiversityAnchor(setup.recipe, 2)(host.denoiser, batch, data)
        pull = torch.autograd.grad(loss, host.denoiser.roles.parameters("student"))
    for alone, both, one in zip(found[0.0], found[0.05], pull, strict=True):
        torch.testing.assert_close(both, alone + 0.05 * one, rtol=1e-3, atol=1e-3)


def test_a_student_of_one_step_has_no_first_of_several() -> None:
    with pytest.raises(OneStepError, match="set diversity_anchor to 0, or student_steps to 2 to 8"):
        METHODS["dmd"].check(SmallHost(), settings_for(diversity_anchor=0.05))
    METHODS["dmd"].check(SmallHost(), settings_for(diversity_anchor=0.05, student_steps=4))
