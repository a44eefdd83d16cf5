"""Samplers against closed forms: the Gaussian's exact ODE, the forward kernel's moments, diffusers' own schedulers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler
from oracles import CASES, TAU, Array, Case, World, drawn, posterior_mean, rows, stable_diffusion_levels
from torch import Tensor

from onestep.core.recipe import PRESETS, Recipe
from onestep.core.sampling import diffuse, initial_latents, jump, sample, teacher_sample
from onestep.core.schedule import FlowSchedule, NoiseSchedule, VESchedule, VPSchedule

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EPS, FLOW = CASES[0], CASES[4]
ZERO_TERMINAL, FLOW_SHIFT_3 = CASES[6], CASES[5]


def level(value: float, count: int = 4) -> Tensor:
    return torch.full((count,), value, dtype=torch.float64)


def no_draw(step: int) -> Tensor:
    raise AssertionError("a deterministic recipe draws nothing")


def fresh(step: int) -> Tensor:
    return drawn(seed=100 + step)


# -- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_one_step_is_the_posterior_mean_of_what_enters(case: Case, scale: float) -> None:
    world, noise = World(case), drawn()
    time = float(world.schedule.time_of_sigma(world.sigma())[0])
    found = sample(world.denoise, Recipe((time,), scale), world.cond, noise, no_draw)
    x = scale * np.sqrt(case.alpha**2 + case.sigma**2) * rows(noise)
    np.testing.assert_allclose(rows(found), world.x0("teacher", x, world.cond), atol=1e-12)


@pytest.mark.parametrize("case", [FLOW_SHIFT_3, ZERO_TERMINAL], ids=str)
def test_from_pure_noise_the_step_gives_the_mean_itself(case: Case) -> None:
    """At alpha = 0 there is nothing of x0 in x: D is E[x0 | c], whatever the noise."""
    world = World(case)
    recipe = Recipe.for_student(world.schedule, 1, "unet", ())
    found = sample(world.denoise, recipe, world.cond, drawn(), no_draw)
    np.testing.assert_allclose(rows(found), world.mean("teacher", world.cond), atol=1e-12)


def test_what_enters_has_the_scale_of_its_level() -> None:
    noise = drawn()
    for schedule, sigma, scale in [
        (VPSchedule.scaled_linear(), 0.8, 1.0),
        (FlowSchedule(), 0.8, np.hypot(0.2, 0.8)),
        (FlowSchedule(), 1.0, 1.0),
        (VESchedule(), 80.0, np.hypot(1, 80)),
    ]:
        torch.testing.assert_close(initial_latents(schedule, noise, level(sigma), 1.0), scale * noise)


# -- the teacher's ODE ------------------------------------------------------------------------------------------------


def exact_ode(x: Array, alpha: float, sigma: float, mean: Array) -> Array:
    """(x - alpha mu) / sqrt(alpha^2 tau^2 + sigma^2) is constant along the flow of a Gaussian; at the end alpha = 1."""
    return mean + TAU * (x - alpha * mean) / np.sqrt(alpha**2 * TAU**2 + sigma**2)


STARTS = {
    "eps": (EPS, *stable_diffusion_levels(999)),
    "v, zero-terminal": (ZERO_TERMINAL, 0.0, 1.0),
    "flow": (FLOW, 0.0, 1.0),
    "flow, shift 3": (FLOW_SHIFT_3, 0.0, 1.0),
}


@pytest.mark.parametrize("start", STARTS.values(), ids=list(STARTS))
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_teacher_converges_to_the_exact_flow_at_first_order(
    start: tuple[Case, float, float], guidance: float
) -> None:
    """Twice the steps, half the error. Of two Gaussians of one tau, guidance makes a third with its mean in line."""
    case, alpha, sigma = start
    world, noise, null = World(case), drawn(), World(case).null.repeat(4)
    mean, origin = world.mean("teacher", world.cond), world.mean("teacher", null)
    wanted = exact_ode(rows(noise), alpha, sigma, origin + guidance * (mean - origin))
    errors = []
    for steps in (25, 50, 100):
        found = teacher_sample(world.denoise, world.cond, null, noise, steps, guidance)
        errors.append(np.abs(rows(found) - wanted).max())
    assert errors[2] < 0.06 * max(1.0, guidance)
    assert 1.7 < errors[0] / errors[1] < 2.4 and 1.7 < errors[1] / errors[2] < 2.4


def test_teacher_sampling_is_diffusers_ddim() -> None:
    """A whole trajectory, network and all, from unit noise."""
    world, x = World(EPS), drawn()
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing", clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    for time in timesteps(scheduler, 10):
        eps = world.network(x, torch.full((4,), float(time), dtype=torch.float64), world.cond)
        x = scheduler.step(eps, time, x).prev_sample
    found = teacher_sample(world.denoise, world.cond, None, drawn(), 10, 1.0)
    # diffusers makes its betas in float32
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def timesteps(scheduler: Any, steps: int) -> list[int]:
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


# -- moves between levels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("time", "lower"), [(999, 749), (499, 249), (249, 0)])
def test_a_jump_is_ddims_step(time: int, lower: int) -> None:
    schedule, x, x0 = VPSchedule.scaled_linear(), drawn(seed=1), drawn(seed=2)
    (a, s), (a_r, s_r) = stable_diffusion_levels(time), stable_diffusion_levels(lower)
    # arXiv:2010.02502, Eq. 12, at eta = 0
    wanted = a_r * rows(x0) + s_r * (rows(x) - a * rows(x0)) / s
    np.testing.assert_allclose(rows(jump(schedule, x, x0, level(s), level(s_r))), wanted, atol=1e-12)


def test_a_jump_is_eulers_step() -> None:
    """In VE's space y = x / alpha: dy/ds = (y - D) / s (arXiv:2206.00364, Eq. 3), one Euler step."""
    schedule, x, x0 = VPSchedule.scaled_linear(), drawn(seed=1), drawn(seed=2)
    (a, s), (a_r, s_r) = stable_diffusion_levels(749), stable_diffusion_levels(499)
    y, slope = rows(x) / a, (rows(x) / a - rows(x0)) / (s / a)
    wanted = a_r * (y + (s_r / a_r - s / a) * slope)
    np.testing.assert_allclose(rows(jump(schedule, x, x0, level(s), level(s_r))), wanted, atol=1e-12)
    flow = jump(FlowSchedule(), x, x0, level(0.8), level(0.3))
    np.testing.assert_allclose(rows(flow), rows(x) + (0.3 - 0.8) * (rows(x) - rows(x0)) / 0.8, atol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "sigma", "higher"),
    [
        (VPSchedule.scaled_linear(), 0.3, 0.9),
        (FlowSchedule(), 0.25, 0.75),
        (FlowSchedule(), 0.0, 0.5),
        (FlowSchedule(), 0.5, 1.0),
        (VESchedule(), 0.5, 2.0),
        (VPSchedule.scaled_linear(zero_terminal=True), 0.5, 1.0),
        (VPSchedule.scaled_linear(), 0.5, 0.5),
    ],
)
def test_the_kernel_upwards_has_the_right_mean_and_variance(
    schedule: NoiseSchedule, sigma: float, higher: float
) -> None:
    """q(x_s' | x_s) takes a x0 + s n to a' x0 + s' n': the mean's factor is a'/a, variances add up to s'^2."""
    alphas = {VPSchedule: lambda s: np.sqrt(1 - s**2), FlowSchedule: lambda s: 1 - s, VESchedule: lambda s: 1.0}
    a, a_higher = (alphas[type(schedule)](s) for s in (sigma, higher))
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    factor = float(diffuse(schedule, one, zero, level(sigma, 1), level(higher, 1)))
    spread = float(diffuse(schedule, zero, one, level(sigma, 1), level(higher, 1)))
    assert factor == pytest.approx(a_higher / a, abs=1e-12) and spread >= 0
    assert factor**2 * sigma**2 + spread**2 == pytest.approx(higher**2, abs=1e-12)


def test_fresh_noise_between_steps() -> None:
    """x_1 = alpha' D + sigma' n with n ~ N(0, 1): mean and variance are the factors of D and n."""
    world, noise = World(EPS), drawn()
    found = sample(world.denoise, PRESETS["dmd2-4"], world.cond, noise, fresh)
    x, mean = rows(noise), world.mean("teacher", world.cond)
    times = (999, 749, 499, 249)
    for step, time in enumerate(times):
        x0 = posterior_mean(x, *stable_diffusion_levels(time), mean)
        if step < 3:
            alpha, sigma = stable_diffusion_levels(times[step + 1])
            x = alpha * x0 + sigma * rows(fresh(step))
    np.testing.assert_allclose(rows(found), x0, atol=1e-11)


def test_eta_keeps_the_marginal() -> None:
    """Down to (1 - eta) t, up to t: an exact x0 leaves the right law at t, for every eta."""
    a, s = stable_diffusion_levels(749)
    schedule, x0, n = VPSchedule.scaled_linear(), drawn(seed=1), drawn(seed=2)
    x = torch.from_numpy(a * rows(x0) + s * rows(n)).reshape(x0.shape)
    for eta in (0.0, 0.3, 1.0):
        below, (a_r, s_r) = int((1 - eta) * 499), stable_diffusion_levels(499)
        s_low = stable_diffusion_levels(below)[1]
        down = jump(schedule, x, x0, level(s), level(s_low))
        mean = diffuse(schedule, down, torch.zeros_like(x), level(s_low), level(s_r))
        noise = float(diffuse(schedule, 0 * down, torch.ones_like(x), level(s_low), level(s_r))[0, 0, 0, 0])
        kept = rows(mean) - a_r * rows(x0)
        share = (kept / rows(n)).mean()
        np.testing.assert_allclose(kept, share * rows(n), atol=1e-12)
        assert share**2 + noise**2 == pytest.approx(s_r**2, abs=1e-12)
        assert (noise == 0) == (eta == 0)


# -- whole recipes against diffusers ----------------------------------------------------------------------------------


def eps_loop(world: World, scheduler: Any, x: Tensor, **step: Any) -> Tensor:
    """diffusers' loop over a noise-predicting network; returns the last x0."""
    for time in scheduler.timesteps:
        eps = world.network(x, torch.full((4,), float(time), dtype=torch.float64), world.cond)
        out = scheduler.step(eps, time, x, **step)
        x = out.prev_sample
    return getattr(out, "denoised", x)


@pytest.mark.parametrize(("name", "scheduler"), [("lcm-4", LCMScheduler), ("tcd-4", TCDScheduler)])
def test_recipes_with_noise_are_diffusers_schedulers(name: str, scheduler: type) -> None:
    """The same draws: diffusers takes them from a generator, we are handed them."""
    world, made = World(EPS), scheduler(**STABLE_DIFFUSION)
    made.alphas_cumprod = made.alphas_cumprod.double()
    made.set_timesteps(4)
    draw = torch.Generator().manual_seed(3)
    noises = [torch.randn(4, 2, 2, 2, generator=draw, dtype=torch.float64) for _ in range(3)]
    eta = {"eta": 0.3} if name == "tcd-4" else {}
    wanted = eps_loop(world, made, drawn(), generator=torch.Generator().manual_seed(3), **eta)
    found = sample(world.denoise, PRESETS[name], world.cond, drawn(), lambda step: noises[step])
    # TCD ends at its first trained time (sigma 0.03), not at 0: its x0 is ours to within that
    atol = 0.06 if name == "tcd-4" else 1e-4
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=atol)


def test_the_tcd_step_is_diffusers() -> None:
    world, made = World(EPS), TCDScheduler(**STABLE_DIFFUSION)
    made.set_timesteps(4)
    x, noise = drawn(), torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    eps = world.network(x, torch.full((4,), 999.0, dtype=torch.float64), world.cond)
    out = made.step(eps, 999, x, eta=0.3, generator=torch.Generator().manual_seed(3))
    seen: list[Tensor] = []
    world.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    sample(world.denoise, PRESETS["tcd-4"], world.cond, drawn(), lambda step: noise if step == 0 else fresh(step))
    torch.testing.assert_close(seen[1], out.prev_sample, rtol=1e-4, atol=1e-4)


def test_deterministic_recipes_are_diffusers_schedulers() -> None:
    world = World(EPS)
    made = DDIMScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing", clip_sample=False)
    made.set_timesteps(4)
    found = sample(world.denoise, PRESETS["sdxl-lightning-4"], world.cond, drawn(), no_draw)
    torch.testing.assert_close(found, eps_loop(world, made, drawn()), rtol=1e-4, atol=1e-4)

    world, x = World(FLOW_SHIFT_3), drawn()
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(4)
    for time in euler.timesteps:
        velocity = world.network(x, torch.full((4,), float(time), dtype=torch.float64), world.cond)
        x = euler.step(velocity, time, x).prev_sample
    found = sample(world.denoise, PRESETS["sd3.5-turbo-4"], world.cond, drawn(), no_draw)
    torch.testing.assert_close(found, x.double(), rtol=1e-5, atol=1e-5)


def test_noise_is_drawn_between_steps_and_nowhere_else() -> None:
    world, asked = World(EPS), []
    sample(world.denoise, PRESETS["lcm-4"], world.cond, drawn(), lambda step: asked.append(step) or drawn(seed=step))
    assert asked == [0, 1, 2]


def test_a_recipes_guidance_is_used() -> None:
    world, noise = World(EPS), drawn()
    time = float(world.schedule.time_of_sigma(world.sigma())[0])
    null = world.null.repeat(4)
    found = sample(world.denoise, Recipe((time,), guidance=2.5), world.cond, noise, no_draw, null)
    d_c, d_u = (world.x0("teacher", rows(noise), cond) for cond in (world.cond, null))
    np.testing.assert_allclose(rows(found), d_u + 2.5 * (d_c - d_u), atol=1e-11)
