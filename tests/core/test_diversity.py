"""Where the base stops and the distilled model goes on: levels in NumPy, states against the Gaussian's closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracles import CASES, Array, World, drawn, posterior_mean, rows, stable_diffusion_levels

from onestep.core.diversity import base_levels, base_part, descend, remaining
from onestep.core.errors import OneStepError
from onestep.core.recipe import PRESETS, Recipe
from onestep.core.sampling import sample
from onestep.core.schedule import FlowSchedule, VESchedule, VPSchedule

VP, FLOW = VPSchedule.scaled_linear(), FlowSchedule(3.0)
ZERO = VPSchedule.scaled_linear(zero_terminal=True)
EPS, V_ZERO, FLOW_CASE = CASES[0], CASES[6], CASES[5]


def vp_log_snr(time: int, zero: bool = False) -> float:
    alpha, sigma = stable_diffusion_levels(time, zero)
    return float(np.log(alpha) - np.log(sigma))


def flow_log_snr(time: float) -> float:
    return float(np.log(1000 - time) - np.log(time))


QUARTERS = Recipe((1000.0, 900.0, 750.0, 500.0), family="sd3", shift=3.0)

# -- what is left of a recipe -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "schedule", "hand_over", "told"),
    [
        (PRESETS["dmd2-4"], VP, 0.0, (749, 499, 249)),
        (PRESETS["sdxl-lightning-2"], VP, 0.0, (499,)),
        (PRESETS["hyper-sdxl-1-unet"], VP, 0.6, (599,)),
        (PRESETS["flux-schnell-4"], FlowSchedule(), 0.0, (750, 500, 250)),
        (PRESETS["sd3.5-turbo-4"], FLOW, 0.0, (857.69232, 602.15057, 8.9285717)),
        (QUARTERS, FLOW, 0.0, (900, 750, 500)),
        (PRESETS["sd-turbo-1"], VP, 0.75, (749,)),
        (PRESETS["dmd2-4"], VP, 0.6, (599, 499, 249)),
        (PRESETS["dmd2-4"], VP, 0.1, (100,)),
        # a share u of a flow's time is the level 3 u / (1 + 2 u)
        (QUARTERS, FLOW, 0.5, (750, 500)),
    ],
)
def test_the_distilled_model_keeps_its_later_steps(recipe: Recipe, schedule: Any, hand_over: float, told: Any) -> None:
    rest = remaining(recipe, schedule, hand_over)
    np.testing.assert_allclose(rest.timesteps, told, atol=1e-9)
    assert rest.initial_noise_scale == 1
    assert (rest.renoise, rest.eta, rest.family, rest.shift) == (
        recipe.renoise,
        recipe.eta,
        recipe.family,
        recipe.shift,
    )


def test_the_bases_state_enters_as_it_is() -> None:
    """Whatever noise the recipe itself would begin with."""
    assert remaining(Recipe((999.0, 699.0), 0.8), VP).initial_noise_scale == 1


@pytest.mark.parametrize("value", [-0.1, 1.0, 2.0, float("nan"), float("inf")])
def test_a_hand_over_outside_the_time_is_refused(value: float) -> None:
    with pytest.raises(OneStepError, match="hand_over is"):
        remaining(PRESETS["dmd2-4"], VP, value)


@pytest.mark.parametrize("name", ["sd-turbo-1", "sdxl-lightning-1", "hyper-sd-1-lora", "hyper-sdxl-1-unet", "dmd2-1"])
def test_one_step_leaves_nothing_to_the_base(name: str) -> None:
    """Also where it is told a lower level: what it has seen there is noise."""
    with pytest.raises(OneStepError, match="hand_over to the share"):
        remaining(PRESETS[name], VP)


# -- where the base stops ---------------------------------------------------------------------------------------------


def paper_stop(own: list[float], wanted: float) -> int:
    """`run_base_till_timestep` of the authors' improved_sdxl_inference.py: argmin |t_base - t_distilled|."""
    return int(np.abs(np.array(own) - wanted).argmin())


@pytest.mark.parametrize("steps", [2, 4, 8, 20, 50])
@pytest.mark.parametrize("time", [749, 625, 499, 259])
def test_the_base_ends_at_the_hand_overs_log_snr_after_as_many_steps_as_the_papers(steps: int, time: int) -> None:
    own = [round(1000 * left / steps) - 1 for left in range(steps, 0, -1)]
    found = base_levels(VP, steps, VP, Recipe((float(time),)))
    alpha, sigma = stable_diffusion_levels(time)
    # the angle atan(sigma / alpha), in which a level is near, grows with the time but not evenly: where two levels
    # are about as near either may be taken
    counts = {max(1, paper_stop(own, time + shift)) for shift in (-10, 0, 10)}
    assert len(found) - 1 in counts
    expected = [stable_diffusion_levels(at)[1] for at in own[: len(found) - 1]] + [sigma]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    assert bool((found.diff() < 0).all())


def test_a_level_that_almost_is_the_hand_over_is_replaced_by_it() -> None:
    """A step of its own there would cost a forward and move nothing."""
    levels = torch.tensor([-3.0, -1.0, 0.499, 2.0], dtype=torch.float64)
    np.testing.assert_allclose(base_part(levels, torch.tensor(0.5)).numpy(), [-3, -1, 0.5])
    np.testing.assert_allclose(base_part(levels, torch.tensor(0.498)).numpy(), [-3, -1, 0.498])


def test_the_base_takes_one_step_at_least() -> None:
    levels = torch.tensor([-3.0, 1.0], dtype=torch.float64)
    np.testing.assert_allclose(base_part(levels, torch.tensor(-2.9)).numpy(), [-3, -2.9])
    np.testing.assert_allclose(base_part(levels[:1], torch.tensor(1.0)).numpy(), [-3, 1.0])


@pytest.mark.parametrize("until", [-3.0, -5.0, float("-inf")])
def test_a_hand_over_above_the_bases_start_is_refused(until: float) -> None:
    with pytest.raises(OneStepError, match="no cleaner than where the base begins"):
        base_part(torch.tensor([-3.0, 1.0], dtype=torch.float64), torch.tensor(until))


@pytest.mark.parametrize(
    ("base", "distilled", "time", "wanted"),
    [
        (VP, FLOW, 600.0, flow_log_snr(600)),
        (FLOW, VP, 499.0, vp_log_snr(499)),
        (ZERO, VP, 499.0, vp_log_snr(499)),
        (VP, ZERO, 749.0, vp_log_snr(749, True)),
        (VESchedule(), FLOW, 600.0, flow_log_snr(600)),
    ],
)
def test_schedules_of_two_kinds_meet_at_one_log_snr(base: Any, distilled: Any, time: float, wanted: float) -> None:
    last = float(base_levels(base, 10, distilled, Recipe((time,)))[-1])
    alpha = {VPSchedule: lambda s: np.sqrt(1 - s**2), FlowSchedule: lambda s: 1 - s, VESchedule: lambda s: 1.0}
    assert np.log(alpha[type(base)](last)) - np.log(last) == pytest.approx(wanted, abs=1e-9)


# -- the state that crosses -------------------------------------------------------------------------------------------


def ddim(x: Array, levels: list[tuple[float, float]], mean: Array) -> Array:
    """arXiv:2010.02502, Eq. 12 at eta 0, through ``levels`` (alpha, sigma), on the Gaussian's own posterior mean."""
    for (a, s), (a_r, s_r) in zip(levels, levels[1:], strict=False):
        x0 = posterior_mean(x, a, s, mean)
        x = a_r * x0 + s_r * (x - a * x0) / s
    return x


def guided_mean(world: World, guidance: float) -> Array:
    """Of two Gaussians of one deviation guidance makes a third, whose mean lies in line."""
    mean, origin = (world.mean("teacher", cond) for cond in (world.cond, world.null.repeat(4)))
    return origin + guidance * (mean - origin)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["eps", "v, zero-terminal", "flow"])
def test_the_base_goes_down_by_its_own_ode_and_hands_over_in_units_of_the_level(kind: str, guidance: float) -> None:
    case = {"eps": EPS, "v, zero-terminal": V_ZERO, "flow": FLOW_CASE}[kind]
    world, noise = World(case), drawn()
    if kind == "flow":
        levels = [(1 - s, s) for s in (1.0, 0.9, 0.7)]
    else:
        levels = [stable_diffusion_levels(time, kind != "eps") for time in (999, 849, 599)]
    sigmas = torch.tensor([s for _, s in levels], dtype=torch.float64)
    found = descend(world.denoise, sigmas, world.cond, world.null.repeat(4), noise, guidance)
    x = np.hypot(*levels[0]) * rows(noise)
    wanted = ddim(x, levels, guided_mean(world, guidance)) / np.hypot(*levels[-1])
    np.testing.assert_allclose(rows(found), wanted, atol=1e-10)


@pytest.mark.parametrize(("first", "second"), [(EPS, FLOW_CASE), (FLOW_CASE, EPS), (EPS, EPS), (FLOW_CASE, FLOW_CASE)])
def test_the_distilled_model_receives_the_bases_state_at_its_own_scale(first: Any, second: Any) -> None:
    """x_vp = x / sqrt(alpha^2 + sigma^2) of a flow's state at one log-SNR, and back."""
    base, student, noise = World(first), World(second), drawn()
    time = 700.0 if second is FLOW_CASE else 650.0
    a, s = (0.3, 0.7) if second is FLOW_CASE else stable_diffusion_levels(650)
    rest = Recipe((time,))
    levels = base_levels(base.schedule, 4, student.schedule, rest)
    state = descend(base.denoise, levels, base.cond, None, noise, 1.0)
    with student.roles.use("student"):
        found = sample(student.denoise, rest, student.cond, state, lambda step: noise)

    own = [shifted(left / 4) if first is FLOW_CASE else stable_diffusion_levels(250 * left - 1) for left in (4, 3, 2)]
    own = own[: len(levels) - 1]
    ratio = s / a
    last = (1 / (1 + ratio), ratio / (1 + ratio)) if first is FLOW_CASE else (a / np.hypot(a, s), s / np.hypot(a, s))
    x = ddim(np.hypot(*own[0]) * rows(noise), [*own, last], base.mean("teacher", base.cond))
    crossed = x / np.hypot(*last) * np.hypot(a, s)
    wanted = student.x0("student", crossed, student.cond, a, s)
    np.testing.assert_allclose(rows(found), wanted, atol=1e-9)


def shifted(share: float) -> tuple[float, float]:
    """(alpha, sigma) of SD3's shift of 3 (arXiv:2403.03206, Eq. 23)."""
    sigma = 3 * share / (1 + 2 * share)
    return 1 - sigma, sigma
