"""Where objectives look and how they weigh: samplers in their range, weights equal to their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import stable_diffusion_levels

from onestep.core.schedule import FlowSchedule, NoiseSchedule, VESchedule, VPSchedule, log_snr
from onestep.training.engine.levels import LogitNormalTime, NormalLogSNR, UniformTime, at, v_weight, vsd_weight

SHARES = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]


def test_uniform_time_is_uniform_in_the_networks_time() -> None:
    """t = 0.02 T to 0.98 T of T - 1 trained indices; for a flow model t = shift(u)."""
    vp, flow = VPSchedule.scaled_linear(), FlowSchedule(3.0)
    times = vp.time_of_sigma(UniformTime()(vp, SHARES))
    np.testing.assert_array_equal(times.numpy(), np.round((0.02 + 0.96 * SHARES.numpy()) * 999))
    assert (float(times.min()), float(times.max())) == (20, 978)
    u = 0.1 + 0.8 * SHARES.numpy()
    np.testing.assert_allclose(UniformTime(0.1, 0.9)(flow, SHARES).numpy(), 3 * u / (1 + 2 * u), rtol=1e-12)


@pytest.mark.parametrize("schedule", [VPSchedule.scaled_linear(), FlowSchedule(), VESchedule()])
def test_normal_log_snr_is_normal(schedule: NoiseSchedule) -> None:
    """EDM's P_mean -1.2, P_std 1.2 of log sigma on VE: lambda = -log sigma. Quantiles by the error function."""
    lam = log_snr(schedule, NormalLogSNR()(schedule, SHARES[1:]))
    cdf = [0.5 * (1 + math.erf((value - 1.2) / 1.2 / math.sqrt(2))) for value in lam.tolist()]
    np.testing.assert_allclose(cdf, SHARES[1:].numpy(), atol=1e-9)
    ends = NormalLogSNR()(schedule, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert bool(ends.isfinite().all())


@pytest.mark.parametrize("schedule", [VPSchedule.scaled_linear(), FlowSchedule()])
def test_logit_normal_time_is_normal(schedule: NoiseSchedule) -> None:
    """The logit of the share of time has mean 1, deviation 0.5: quantiles by the error function, to a time's step."""
    share = schedule.share_of(LogitNormalTime(1.0, 0.5)(schedule, SHARES[1:-1])).numpy()
    logit = np.log(share / (1 - share))
    cdf = [0.5 * (1 + math.erf((value - 1.0) / 0.5 / math.sqrt(2))) for value in logit.tolist()]
    np.testing.assert_allclose(cdf, SHARES[1:-1].numpy(), atol=5e-3)
    ends = LogitNormalTime(1.0, 0.5)(schedule, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert bool(ends.isfinite().all()) and bool((ends > 0).all())


@pytest.mark.parametrize("time", [0, 200, 700, 999])
def test_weights_are_their_definitions(time: int) -> None:
    """v_weight |dx0|^2 = |dv|^2 with v = (alpha x - x0) / sigma at alpha^2 + sigma^2 = 1; vsd_weight = alpha sigma."""
    alpha, sigma = stable_diffusion_levels(time)
    level = torch.tensor([sigma], dtype=torch.float64)
    schedule = VPSchedule.scaled_linear()
    assert float(at(v_weight, schedule, level)) == pytest.approx(1 / sigma**2, rel=1e-9)
    assert float(at(vsd_weight, schedule, level)) == pytest.approx(alpha * sigma, rel=1e-9)


def test_weights_on_other_schedules() -> None:
    """vsd_weight is s / (1 + s^2) of the VE level s = sigma / alpha, whatever the schedule."""
    sigma = torch.tensor([0.3], dtype=torch.float64)
    for schedule, s in ((FlowSchedule(), 0.3 / 0.7), (VESchedule(), 0.3)):
        assert float(at(vsd_weight, schedule, sigma)) == pytest.approx(s / (1 + s**2), rel=1e-12)
        assert float(at(v_weight, schedule, sigma)) == pytest.approx(1 + 1 / s**2, rel=1e-12)


@pytest.mark.parametrize("schedule", [FlowSchedule(), VPSchedule.scaled_linear(zero_terminal=True)])
def test_weights_are_finite_at_pure_noise(schedule: NoiseSchedule) -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert float(at(v_weight, schedule, one)) == 1 and float(at(vsd_weight, schedule, one)) == 0
