"""Noise schedules agree with diffusers' tables, with the papers' formulas, and with their own inverses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from onestep.core.schedule import FlowSchedule, NoiseSchedule, VESchedule, VPSchedule, add_noise, expand, log_snr

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
SCHEDULES: dict[str, NoiseSchedule] = {
    "vp": VPSchedule.scaled_linear(),
    "zero-terminal": VPSchedule.scaled_linear(zero_terminal=True),
    "linear betas": VPSchedule.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
    "flow": FlowSchedule(),
    "flow, shift 3": FlowSchedule(3.0),
    "ve": VESchedule(),
}
TIMES = torch.arange(1000, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_level_has_its_share(name: str) -> None:
    schedule, shares = SCHEDULES[name], torch.arange(0, 1000, 37, dtype=torch.float64) / 999
    torch.testing.assert_close(schedule.share_of(schedule.sigma_at(shares)), shares, rtol=1e-9, atol=1e-9)


def levels(schedule: NoiseSchedule, count: int = 41) -> torch.Tensor:
    """From the cleanest level that has a finite log-SNR to pure noise."""
    low = max(schedule.sigma_min, 1e-3)
    return torch.linspace(low, schedule.sigma_max, count, dtype=torch.float64)


def test_the_table_is_diffusers_own() -> None:
    """VP levels are sqrt(1 - abar), not the VE levels of k-diffusion; both hold the same ratio."""
    ddim, euler = DDIMScheduler(**STABLE_DIFFUSION), EulerDiscreteScheduler(**STABLE_DIFFUSION)
    schedule = VPSchedule.scaled_linear()
    sigma = schedule.sigma_of_time(TIMES)
    torch.testing.assert_close(1 - sigma**2, ddim.alphas_cumprod.double(), rtol=2e-5, atol=1e-7)
    ratio = sigma / schedule.alpha(sigma)
    np.testing.assert_allclose(ratio.numpy(), euler.sigmas[:-1].flip(0).numpy(), rtol=2e-5)


def test_linear_betas_are_diffusers_own() -> None:
    abar = DDIMScheduler(**LINEAR).alphas_cumprod.double()
    sigma = SCHEDULES["linear betas"].sigma_of_time(TIMES)
    torch.testing.assert_close(1 - sigma**2, abar, rtol=1e-4, atol=1e-7)


def test_zero_terminal_rescaling_is_the_papers() -> None:
    """diffusers' rescale_zero_terminal_snr, fed with the same float64 betas."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    wanted = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    schedule = VPSchedule.scaled_linear(zero_terminal=True)
    torch.testing.assert_close(schedule.alphas_cumprod, wanted, rtol=1e-9, atol=1e-12)
    assert schedule.alphas_cumprod[-1] == 0 and schedule.sigma_max == 1
    last = schedule.sigma_of_time(torch.tensor(999.0))
    assert float(last) == 1 and float(schedule.alpha(last)) == 0
    assert float(log_snr(schedule, last)) == -math.inf
    # the first level is what it was
    assert schedule.alphas_cumprod[0] == pytest.approx(1 - 0.00085, abs=1e-12)


@pytest.mark.parametrize("shift", [1.0, 1.15, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 28])
def test_flow_levels_are_diffusers_own(shift: float, steps: int) -> None:
    """The sigmas that Flux' pipeline hands to FlowMatchEuler: linspace(1, 1 / n, n), then the shift."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    schedule = FlowSchedule(shift)
    times = schedule.trailing(steps)
    np.testing.assert_allclose(times.numpy(), scheduler.timesteps.double().numpy(), rtol=1e-6)
    np.testing.assert_allclose(schedule.sigma_of_time(times).numpy(), scheduler.sigmas[:-1].double().numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", ["vp", "zero-terminal", "linear betas"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 8, 16, 20, 25, 30, 50, 999, 1000])
def test_trailing_times_are_diffusers_own(name: str, steps: int) -> None:
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert SCHEDULES[name].trailing(steps).tolist() == scheduler.timesteps.double().tolist()


def test_karras_levels_are_the_papers() -> None:
    """arXiv:2206.00364, Eq. 5, over N = 5 steps; and c_noise = log(sigma) / 4 of table 1."""
    low, high, rho = 0.002, 80.0, 7
    wanted = [(high ** (1 / rho) + i / 5 * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(5)]
    schedule = VESchedule()
    times = schedule.trailing(5)
    np.testing.assert_allclose(schedule.sigma_of_time(times).numpy(), wanted, rtol=1e-12)
    np.testing.assert_allclose(times.numpy(), np.log(wanted) / 4, rtol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_snr_and_its_inverse(name: str) -> None:
    schedule = SCHEDULES[name]
    sigma = levels(schedule)
    lam = log_snr(schedule, sigma)
    torch.testing.assert_close(schedule.sigma_of_log_snr(lam), sigma, rtol=1e-12, atol=1e-12)
    assert bool((lam[1:] < lam[:-1]).all()), "log-SNR falls as noise grows"


def test_log_snr_by_hand() -> None:
    sigma = torch.tensor([0.3], dtype=torch.float64)
    for name, alpha in {"vp": math.sqrt(1 - 0.09), "flow": 0.7, "ve": 1.0}.items():
        assert float(log_snr(SCHEDULES[name], sigma)) == pytest.approx(math.log(alpha / 0.3), rel=1e-14)


@pytest.mark.parametrize("name", ["vp", "zero-terminal", "linear betas"])
def test_trained_times_survive_the_round_trip(name: str) -> None:
    """Every index, the crowded clean end and the noisy one included."""
    schedule = SCHEDULES[name]
    assert schedule.time_of_sigma(schedule.sigma_of_time(TIMES)).tolist() == TIMES.tolist()


@pytest.mark.parametrize("name", ["flow", "flow, shift 3", "ve"])
def test_times_survive_the_round_trip(name: str) -> None:
    schedule = SCHEDULES[name]
    sigma = levels(schedule)
    torch.testing.assert_close(schedule.sigma_of_time(schedule.time_of_sigma(sigma)), sigma, rtol=1e-13, atol=0)


def test_networks_are_told_the_nearest_trained_time() -> None:
    schedule = VPSchedule.scaled_linear()
    angles = torch.asin(schedule.sigma_of_time(TIMES))
    for time in (0.0, 12.4, 499.49, 499.51, 998.7, 999.0):
        sigma = schedule.sigma_of_time(torch.tensor([time]))
        wanted = (angles - torch.asin(sigma)).abs().argmin()
        assert float(schedule.time_of_sigma(sigma)) == float(wanted)


def test_levels_beyond_the_table_are_told_its_ends() -> None:
    schedule = VPSchedule.scaled_linear()
    assert schedule.time_of_sigma(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == [0, 999]
    ends = [schedule.sigma_min, schedule.sigma_max]
    assert schedule.sigma_of_time(torch.tensor([-5.0, 5000.0])).tolist() == pytest.approx(ends, rel=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_shares_run_from_clean_to_pure_noise(name: str) -> None:
    schedule = SCHEDULES[name]
    sigma = schedule.sigma_at(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert float(sigma[0]) == pytest.approx(schedule.sigma_min) and float(sigma[-1]) == pytest.approx(
        schedule.sigma_max
    )
    assert bool((sigma[1:] > sigma[:-1]).all())


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_are_float64_whatever_comes_in(name: str) -> None:
    """In float32, alpha at the noisy end would be wrong in its third figure."""
    schedule = SCHEDULES[name]
    for level in (torch.tensor([0.5]), torch.tensor([0.5], dtype=torch.float16)):
        for made in (schedule.alpha(level), schedule.sigma_at(level), schedule.sigma_of_time(level)):
            assert made.dtype == torch.float64


def test_add_noise_by_hand_and_by_diffusers() -> None:
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    times = torch.tensor([10, 500, 999])
    schedule = VPSchedule.scaled_linear()
    sigma = schedule.sigma_of_time(times)
    wanted = DDIMScheduler(**STABLE_DIFFUSION).add_noise(x0, noise, times)
    torch.testing.assert_close(add_noise(schedule, x0, noise, sigma), wanted, rtol=1e-5, atol=1e-5)
    flow = add_noise(FlowSchedule(), x0, noise, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(flow[0], x0[0])
    torch.testing.assert_close(flow[1], 0.75 * x0[1] + 0.25 * noise[1])
    torch.testing.assert_close(flow[2], noise[2])


def test_expand_takes_the_latents_shape_and_dtype() -> None:
    level = torch.rand(5, dtype=torch.float64)
    for like in (torch.zeros(5, 3), torch.zeros(5, 4, 8, 8), torch.zeros(5, 4, 2, 8, 8, dtype=torch.float64)):
        made = expand(level, like)
        assert made.shape == (5, *[1] * (like.ndim - 1)) and made.dtype == like.dtype
