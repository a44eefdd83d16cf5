"""Every parameterisation gives the same D, equal to the Gaussian's posterior mean; guidance is linear in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import CASES, WIDTH, Case, World, drawn, posterior_mean, rows, stable_diffusion_levels

from onestep.core.cond import Cond
from onestep.core.denoiser import EpsDenoiser, FlowDenoiser, VDenoiser, X0Denoiser, both, guided
from onestep.core.errors import OneStepError
from onestep.core.roles import Roles
from onestep.core.schedule import FlowSchedule, VESchedule, VPSchedule, add_noise, expand


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("role", ["teacher", "student", "critic"])
def test_d_is_the_posterior_mean(case: Case, role: str) -> None:
    world, x = World(case), drawn()
    with world.roles.use(role):
        found = world.denoise(x, world.sigma(), world.cond)
    np.testing.assert_allclose(rows(found), world.x0(role, rows(x), world.cond), atol=1e-12)


def test_all_parameterisations_of_one_schedule_agree() -> None:
    """eps, v and x0 networks at every level that a U-Net is told."""
    cases = [case for case in CASES if case.name in ("eps", "v", "x0")]
    x = drawn()
    for time in (0, 10, 500, 980, 999):
        alpha, sigma = stable_diffusion_levels(time)
        for case in cases:
            world = World(case)
            found = world.denoise(x, torch.full((4,), sigma, dtype=torch.float64), world.cond)
            wanted = posterior_mean(rows(x), alpha, sigma, world.mean("teacher", world.cond))
            # at time 999 an eps network's last digits are multiplied by 1 / alpha = 14.6
            np.testing.assert_allclose(rows(found), wanted, atol=2e-11)


def test_the_closed_form_is_the_posterior_mean() -> None:
    """The oracle itself, by brute force: E[x0 | x] over a grid of x0."""
    alpha, sigma, x, mean = 0.6, 0.8, 0.4, -1.2
    grid = np.linspace(-12, 12, 200_001)
    weight = np.exp(-0.5 * ((x - alpha * grid) / sigma) ** 2 - 0.5 * ((grid - mean) / 0.7) ** 2)
    brute = (grid * weight).sum() / weight.sum()
    full = np.full((1, WIDTH), x)
    assert posterior_mean(full, alpha, sigma, np.full((1, WIDTH), mean))[0, 0] == pytest.approx(brute, abs=1e-9)


@pytest.mark.parametrize("wrap", [VDenoiser, FlowDenoiser, X0Denoiser])
def test_wrappers_undo_their_own_definition(wrap: type) -> None:
    """x0 from a network that answers the exact target; for v on VE too, where alpha^2 + sigma^2 is not 1."""
    schedules = {VDenoiser: [VPSchedule.scaled_linear(), VESchedule()], FlowDenoiser: [FlowSchedule()]}
    x0, noise = drawn(seed=1), drawn(seed=2)
    for schedule in schedules.get(wrap, [VESchedule()]):
        sigma = torch.tensor([0.1, 0.5, 0.9, schedule.sigma_max], dtype=torch.float64)
        a, s = expand(schedule.alpha(sigma), x0), expand(sigma, x0)
        target = {VDenoiser: a * noise - s * x0, FlowDenoiser: noise - x0, X0Denoiser: x0}[wrap]
        denoise = wrap(lambda x, time, cond, target=target: target, schedule, Roles([]))
        found = denoise(add_noise(schedule, x0, noise, sigma), sigma, Cond(torch.zeros(4, 1, 1)))
        torch.testing.assert_close(found, x0, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", [FlowSchedule(), VPSchedule.scaled_linear(zero_terminal=True)])
def test_eps_at_pure_noise_is_refused(schedule: FlowSchedule | VPSchedule) -> None:
    denoise = EpsDenoiser(lambda x, time, cond: x, schedule, Roles([]))
    cond = Cond(torch.zeros(2, 1, 1))
    with pytest.raises(OneStepError, match="alpha = 0.*zero-terminal"):
        denoise(drawn(2), torch.tensor([0.5, 1.0], dtype=torch.float64), cond)
    assert bool(denoise(drawn(2), torch.tensor([0.5, 0.9], dtype=torch.float64), cond).isfinite().all())


def test_the_network_is_told_its_own_time_in_the_latents_dtype() -> None:
    told = []
    for schedule, sigma in [(VPSchedule.scaled_linear(), stable_diffusion_levels(399)[1]), (FlowSchedule(), 0.75)]:
        denoise = X0Denoiser(lambda x, time, cond: told.append(time) or x, schedule, Roles([]))
        denoise(drawn(2).float(), torch.full((2,), sigma, dtype=torch.float64), Cond(torch.zeros(2, 1, 1)))
    assert [time.tolist() for time in told] == [[399, 399], [750, 750]]
    assert all(time.dtype == torch.float32 for time in told)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_network_answers_in_the_latents_dtype(dtype: torch.dtype) -> None:
    """The network may compute in what it likes; x and D cross the border in float32."""
    denoise = EpsDenoiser(lambda x, time, cond: x.to(dtype), VPSchedule.scaled_linear(), Roles([]))
    sigma = torch.full((2,), 0.5, dtype=torch.float64)
    assert denoise(drawn(2).float(), sigma, Cond(torch.zeros(2, 1, 1))).dtype == torch.float32


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5, -2.0])
def test_guidance_is_linear(case: Case, scale: float) -> None:
    """D_u + k (D_c - D_u), arXiv:2207.12598, Eq. 6 in x0."""
    world, x = World(case), drawn()
    null = world.null.repeat(4)
    found = guided(world.denoise, x, world.sigma(), world.cond, null, scale)
    d_c, d_u = world.x0("teacher", rows(x), world.cond), world.x0("teacher", rows(x), null)
    np.testing.assert_allclose(rows(found), d_u + scale * (d_c - d_u), atol=1e-11)


def counted(world: World) -> list[int]:
    """The batch sizes of the network's forwards, as they are made."""
    sizes: list[int] = []
    world.network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


def test_guidance_of_one_costs_one_pass() -> None:
    world, x = World(CASES[0]), drawn()
    sizes = counted(world)
    plain = guided(world.denoise, x, world.sigma(), world.cond, None, 1.0)
    torch.testing.assert_close(plain, world.denoise(x, world.sigma(), world.cond), rtol=0, atol=0)
    guided(world.denoise, x, world.sigma(), world.cond, world.null.repeat(4), 2.0)
    assert sizes == [4, 4, 8]


@pytest.mark.parametrize("guidance", ["embedded", "none"])
def test_guidance_without_a_trained_null_is_refused(guidance: str) -> None:
    world = World(CASES[0])
    world.denoise.guidance = guidance
    with pytest.raises(OneStepError, match="no trained null condition.*set guidance to 1"):
        both(world.denoise, drawn(), world.sigma(), world.cond, world.null.repeat(4))
    guided(world.denoise, drawn(), world.sigma(), world.cond, None, 1.0)


def test_gradients_reach_the_latents_and_the_adapters() -> None:
    """dD/dx = alpha tau^2 / (alpha^2 tau^2 + sigma^2) for a Gaussian: the same in every parameterisation."""
    for case in CASES:
        world = World(case)
        x = drawn().requires_grad_()
        with world.roles.use("student"):
            world.denoise(x, world.sigma(), world.cond).sum().backward()
        slope = case.alpha * 0.49 / (case.alpha**2 * 0.49 + case.sigma**2)
        np.testing.assert_allclose(x.grad.numpy(), slope, atol=1e-11)
        assert all(factor.grad is not None for factor in world.roles.parameters("student"))
