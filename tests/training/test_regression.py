"""Regression on the teacher's pairs, and the student's own roll-out, in closed form."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from oracles import CASES, TAU, WIDTH, Array, Case, World, drawn, rows

from onestep.core.recipe import Recipe
from onestep.training.engine.student import generate, level
from onestep.training.methods import regression as method

C = 0.03


def levels_of(world: World, recipe: Recipe, step: int) -> tuple[float, float]:
    """(alpha, sigma) of a recipe's step, from its log-SNR."""
    lam = recipe.log_snr[step]
    if lam is None:
        return 0.0, 1.0
    ratio = np.exp(lam)
    if "flow" in world.case.name:
        return ratio / (1 + ratio), 1 / (1 + ratio)
    return ratio / np.hypot(1, ratio), 1 / np.hypot(1, ratio)


def huber(error: Array) -> Array:
    """sqrt(e^2 + c^2) - c, summed over a sample, averaged over samples."""
    return (np.sqrt(error**2 + C**2) - C).sum(1).mean()


def step_of(world: World, recipe: Recipe, wanted: int) -> int:
    """An update in which the draw picks the recipe's step ``wanted``."""
    return next(n for n in range(100) if world.batch(step=n).choice(recipe.steps, "student step") == wanted)


def check_first_step(module: ModuleType, case: Case) -> None:
    world = World(case)
    recipe = Recipe.for_student(world.schedule, 1, "unet", ())
    noise, target = drawn(seed=1), drawn(seed=2)
    loss = module.Regression(recipe)(world.denoise, world.batch(), (noise, target))
    loss.backward()
    alpha, sigma = levels_of(world, recipe, 0)
    x = np.hypot(alpha, sigma) * rows(noise)
    error = world.x0("student", x, world.cond, alpha, sigma) - rows(target)
    assert float(loss.detach()) == pytest.approx(huber(error), rel=1e-9)
    # dD/dmean = sigma^2 / (alpha^2 tau^2 + sigma^2); d huber / de = e / sqrt(e^2 + c^2)
    d_mean = error / np.sqrt(error**2 + C**2) / 4 * sigma**2 / (alpha**2 * TAU**2 + sigma**2)
    world.check_gradient(d_mean)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_and_its_gradient_in_closed_form(case: Case) -> None:
    check_first_step(method, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_later_step_starts_from_the_targets_noised(case: Case) -> None:
    """x = alpha x_T + sigma n at the later level, with fresh noise of that step."""
    world = World(case)
    recipe = Recipe.for_student(world.schedule, 4, "unet", ())
    noise, target = drawn(seed=1), drawn(seed=2)
    for step in (1, 3):
        batch = world.batch(step=step_of(world, recipe, step))
        loss = method.Regression(recipe)(world.denoise, batch, (noise, target))
        alpha, sigma = levels_of(world, recipe, step)
        x = alpha * rows(target) + sigma * rows(batch.normal(f"renoise {step - 1}"))
        error = world.x0("student", x, world.cond, alpha, sigma) - rows(target)
        assert float(loss.detach()) == pytest.approx(huber(error), rel=1e-9)


def test_the_distance_is_square_near_and_linear_far() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    for error, wanted in [(1e-4, 1e-8 / (2 * C)), (100.0, 100 - C)]:
        found = float(method.pseudo_huber(zero + error, zero, C))
        assert found == pytest.approx(wanted, rel=1e-4)
    assert float(method.pseudo_huber(zero, zero, C)) == pytest.approx(0, abs=1e-15)


MUTANTS = {
    "a mean for a sum": (".flatten(1).sum(1).mean()", ".flatten(1).mean(1).mean()"),
    "the teacher taught": ("denoise.roles.use(STUDENT)", 'denoise.roles.use("critic")'),
    "no width": ("(a - b) ** 2 + c**2", "(a - b) ** 2 + c"),
    "unscaled noise": (
        "return initial_latents(denoise.schedule, noise, sigma, self.recipe.initial_noise_scale)",
        "return 1.1 * noise",
    ),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_loss_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.regression", *change, monkeypatch)
    must_fail(lambda mutated: check_first_step(mutated, CASES[0]), module)


# -- the student's roll-out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_rollout_in_closed_form(case: Case, steps: int) -> None:
    """Backward simulation: x_0 of each step noised to the next one, up to the step that is drawn."""
    world = World(case)
    recipe = Recipe.for_student(world.schedule, steps, "unet", ())
    for last in range(steps):
        batch = world.batch(step=step_of(world, recipe, last))
        found = generate(world.denoise, recipe, batch)
        alpha, sigma = levels_of(world, recipe, 0)
        x = np.hypot(alpha, sigma) * rows(batch.normal("latent"))
        for step in range(last + 1):
            x0 = world.x0("student", x, world.cond, alpha, sigma)
            if step < last:
                alpha, sigma = levels_of(world, recipe, step + 1)
                x = alpha * x0 + sigma * rows(batch.normal(f"renoise {step}"))
        np.testing.assert_allclose(rows(found), x0, atol=1e-10)


def test_only_the_last_step_of_a_rollout_has_a_graph() -> None:
    """Its gradient in the mean is that of one step: sigma^2 / (alpha^2 tau^2 + sigma^2), whatever came before."""
    world = World(CASES[4])
    recipe = Recipe.for_student(world.schedule, 4, "sd3", ())
    batch = world.batch(step=step_of(world, recipe, 3))
    forwards: list[bool] = []
    world.network.register_forward_pre_hook(lambda module, args: forwards.append(torch.is_grad_enabled()))
    out = generate(world.denoise, recipe, batch)
    out.backward(torch.ones_like(out))
    assert forwards == [False, False, False, True]
    alpha, sigma = levels_of(world, recipe, 3)
    slope = sigma**2 / (alpha**2 * TAU**2 + sigma**2)
    _, b = world.roles.parameters("student")
    a = world.roles.state("student")["mean"][0].double().numpy()
    wanted = slope * np.ones((4, WIDTH)).T @ world.cond.text[:, 0].double().numpy() @ a.T
    assert b.grad is not None
    np.testing.assert_allclose(b.grad.numpy(), wanted, rtol=1e-5)
    assert not generate(world.denoise, recipe, batch, train=False).requires_grad


def test_every_step_is_drawn_about_as_often() -> None:
    world = World(CASES[0])
    counts = np.bincount([world.batch(step=n).choice(4, "student step") for n in range(800)], minlength=4)
    assert len(counts) == 4 and (np.abs(counts - 200) < 5 * np.sqrt(800 * 0.25 * 0.75)).all()


def test_a_level_is_the_recipes_own() -> None:
    world = World(CASES[5])
    recipe = Recipe.for_student(world.schedule, 4, "sd3", ())
    found = [float(level(world.denoise, recipe, step, world.batch())[0]) for step in range(4)]
    np.testing.assert_allclose(found, [1, 0.9, 0.75, 0.5], rtol=1e-12)
