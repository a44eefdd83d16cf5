"""TwinFlow's twin and its matching in closed form, by finite differences, and what they become."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from narrowed import narrowed
from oracles import CASES, Array, At, Case, World, drawn, rows
from small_host import SmallHost, setup_of, small
from two_times_oracle import answer

from onestep.core.continuous import leading
from onestep.core.errors import OneStepError
from onestep.core.roles import TEACHER
from onestep.training.engine.student import STUDENT, add_student
from onestep.training.methods import METHODS
from onestep.training.methods import twinflow as method

WORLDS = [case for case in CASES if case.name in ("eps", "v", "flow")]
PREDICTIONS = ["epsilon", "v_prediction", "flow"]
WIDE = 1e9
"""A bound that nothing meets."""


def share(case: Case) -> Array:
    """tau [4, 1] of the case's level."""
    return np.full((4, 1), case.sigma / (case.alpha + case.sigma))


def noised(world: World, x: Array) -> tuple[Array, Array]:
    """(y_t, n) of the pictures x."""
    noise, t = rows(world.batch().normal("twin noise")), share(world.case)
    return (1 - t) * x + t * noise, noise


def fake(world: World, x: Array) -> Array:
    """F_S(y_t, -t) - F_T(y_t, -t) + F_T(y_t, t) [B, WIDTH]."""
    (y, _), t = noised(world, x), share(world.case)
    own, base = (answer(world, role, y, t, -t, world.cond) for role in (STUDENT, TEACHER))
    return own - base + answer(world, TEACHER, y, t, 0 * t, world.cond)


def true(world: World, x: Array, real: str, k: float) -> Array:
    """v(y_t, t) [B, WIDTH]."""
    (y, _), t, null = noised(world, x), share(world.case), world.cond.null_like(world.null)
    if real == STUDENT:
        return answer(world, STUDENT, y, t, t, world.cond)
    d_c, d_u = (answer(world, TEACHER, y, t, 0 * t, cond) for cond in (world.cond, null))
    return d_u + k * (d_c - d_u)


def adversarial(world: World, x: Array) -> float:
    """L_adv."""
    return float(((fake(world, x) - (noised(world, x)[1] - x)) ** 2).mean())


def check(module: ModuleType, case: Case, real: str) -> None:
    """L_adv, and the difference of both flows, bounded."""
    world, x, bound = World(case), drawn(seed=1), 0.5
    loss, found = module.TwinFlow(real, 3.0, At(case.sigma), bound).twin(world.denoise, world.batch(), x)
    assert float(loss.detach()) == pytest.approx(adversarial(world, rows(x)), rel=1e-9)
    apart = fake(world, rows(x)) - true(world, rows(x), real, 3.0)
    assert (np.abs(apart) > bound).any() and (np.abs(apart) < bound).any()
    np.testing.assert_allclose(rows(found), np.clip(apart, -bound, bound), rtol=1e-6, atol=1e-9)
    assert not found.requires_grad


def check_rectify(module: ModuleType) -> None:
    """dL/dF of |F - sg(F - apart)|^2 at t = 1, x = z - F: the picture goes where the fake flow leads away from."""
    z, f, apart = (drawn(seed=seed) for seed in (1, 2, 3))
    f.requires_grad_()
    module.rectify(z - f, apart).backward()
    other = f.detach().clone().requires_grad_()
    (other - (other.detach() - apart)).square().mean().backward()
    torch.testing.assert_close(f.grad, other.grad)


@pytest.mark.parametrize("real", [TEACHER, STUDENT])
@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_both_terms_in_closed_form(case: Case, real: str) -> None:
    check(method, case, real)


def test_what_is_said_of_the_picture_is_said_of_the_velocity() -> None:
    check_rectify(method)


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_the_twins_gradient_by_finite_differences(case: Case) -> None:
    world, x = World(case), drawn(seed=1)
    factors = world.double_factors(STUDENT)
    loss, _ = method.TwinFlow(levels=At(case.sigma)).twin(world.denoise, world.batch(), x)
    loss.backward()
    for factor in factors:
        place, ends = tuple(0 for _ in factor.shape), []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                factor[place] += step
                ends.append(adversarial(world, rows(x)))
            factor[place] += 1e-6
        assert factor.grad is not None
        assert float(factor.grad[place]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_the_twin_begins_as_the_teacher(case: Case) -> None:
    """A new LoRA's B is 0, and there is nothing to match without guidance."""
    world, x = World(case), drawn(seed=1)
    for _, b in world.roles.state(STUDENT).values():
        b.zero_()
    _, apart = method.TwinFlow(levels=At(case.sigma)).twin(world.denoise, world.batch(), x)
    assert float(apart.abs().max()) < 1e-12


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_a_twin_of_the_students_pictures_is_dmds_difference(case: Case) -> None:
    """(D_T - D_F) / t, where the student at -t / 2 has come to be a critic, of means of its own."""
    world, x = World(case), drawn(seed=1)
    t = share(case)
    (y, _), a, s = noised(world, rows(x)), case.alpha, case.sigma
    plain = world.network.forward
    scale = a + s

    def signed(x: Any, time: Any, cond: Any) -> Any:
        """At negative times the network answers as at the whole positive one."""
        return plain(x, torch.where(time < 0, -2 * time, time), cond)

    world.network.forward = signed  # type: ignore[method-assign]
    _, found = method.TwinFlow(levels=At(s), bound=WIDE).twin(world.denoise, world.batch(), x)
    d_fake, d_real = (world.x0(role, scale * y, world.cond) for role in (STUDENT, TEACHER))
    np.testing.assert_allclose(rows(found), (d_real - d_fake) / t, rtol=1e-6, atol=1e-9)


def test_a_negative_second_time_is_told_negative() -> None:
    for case in (CASES[2], CASES[4]):
        world = World(case)
        most = float(world.schedule.time_of_sigma(torch.tensor(world.schedule.sigma_max, dtype=torch.float64)))
        sigma = world.schedule.sigma_of_time(torch.full((4,), 0.8 * most).double())
        whole = world.schedule.time_of_sigma(sigma)
        sides = sigma * torch.tensor([1.0, -1.0, -1.0, 0.0], dtype=torch.float64)
        told = leading(world.denoise, sides).network_time(sigma)
        torch.testing.assert_close(told, whole * torch.tensor([0.5, -0.5, -0.5, 1.0], dtype=torch.float64))


# -- its run ----------------------------------------------------------------------------------------------------------


def gradients(folder: Path, prediction: str, phase: int, **changes: Any) -> list[torch.Tensor]:
    """Of the student's factors, in the first update of a phase."""
    host = SmallHost(prediction)
    setup = setup_of(host, small(method="twinflow", **changes), folder)
    add_student(host, setup.settings, None)
    with torch.no_grad():
        for _, b in host.denoiser.roles.state(STUDENT).values():
            b.copy_(0.1 * torch.randn(b.shape, generator=torch.Generator().manual_seed(b.numel())))
    loss = METHODS["twinflow"].plan(setup).phases[phase].turns[0].loss
    with host.denoiser.roles.installed():
        loss(setup.prompts.batch(0, range(4)), 1.0, 0)
    found = host.denoiser.roles.parameters(STUDENT)
    return [torch.zeros_like(factor) if factor.grad is None else factor.grad.clone() for factor in found]


@pytest.mark.parametrize("prediction", narrowed(PREDICTIONS, "flow"))
def test_its_gradient_is_the_sum_of_three(prediction: str, tmp_path: Path) -> None:
    """Each with its weight; before the matching there are two."""

    def of(phase: int, twin: float, matched: float) -> list[torch.Tensor]:
        return gradients(tmp_path, prediction, phase, twin_weight=twin, rectify_weight=matched)

    flow, twin, matched = of(1, 0.0, 0.0), of(1, 1.0, 0.0), of(1, 0.0, 1.0)
    for name, found, weights in (("whole", of(1, 0.5, 2.0), (0.5, 2.0)), ("ahead", of(0, 0.5, 2.0), (0.5, 0.0))):
        for one, a, b, c in zip(found, flow, twin, matched, strict=True):
            torch.testing.assert_close(
                one, a + weights[0] * (b - a) + weights[1] * (c - a), rtol=1e-4, atol=1e-6, msg=name
            )
    assert any(bool((b - a).any()) for a, b in zip(flow, twin, strict=True))
    assert any(bool((c - a).any()) for a, c in zip(flow, matched, strict=True))


def test_a_run_of_no_updates_is_refused() -> None:
    with pytest.raises(OneStepError, match="steps"):
        small(method="twinflow", steps=0)


MUTANTS: dict[str, tuple[str, str]] = {
    "the twin at positive times": ("leading(denoise, -sigma)", "leading(denoise, sigma)"),
    "from nothing": ("beyond(x_t, sigma, batch.cond) + start", "beyond(x_t, sigma, batch.cond)"),
    "the base stays": ("- beyond(x_t, sigma, batch.cond)\n", "+ beyond(x_t, sigma, batch.cond)\n"),
    "an error of the picture": ("((fake - x) / t).square()", "(fake - x).square()"),
    "away from the true flow": ("sigma) - fake.detach())", "sigma) + fake.detach())"),
    "unguided": ("batch.nulls(), self.guidance)", "batch.nulls(), 1.0)"),
    "without a bound": (".clamp(-self.bound, self.bound)", ""),
    "the whole second time": ("leading(denoise, sigma)(x_t", "denoise(x_t"),
    "the other way": ("(x.detach() + apart)", "(x.detach() - apart)"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_term_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(mutated: ModuleType) -> None:
        for real in (TEACHER, STUDENT):
            check(mutated, CASES[4], real)
        check_rectify(mutated)

    must_fail(wrong, mutant("onestep.training.methods.twinflow", *change, monkeypatch))
