"""A run of one of several experts lies in its noise range, and two experts draw one picture, one after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from every_method import short
from narrowed import narrowed
from tiny_pipelines import make

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.core.sampling import jump, sample, teacher_sample
from onestep.core.schedule import FlowSchedule, VPSchedule
from onestep.pipelines.adapt import adapt
from onestep.training.distil import distil
from onestep.training.engine.levels import UniformTime
from onestep.training.engine.noise_range import ended, within_range
from onestep.training.methods import METHODS, settings_for
from onestep.training.methods.trajectory import Grid, PhaseEnd

RANGES = {"0.875-1": (0.875, 1.0), "0-0.875": (0.0, 0.875)}
SIZE = (48, 32)


@pytest.mark.parametrize("told", RANGES)
def test_every_level_lies_in_the_range_and_shares_are_of_it(told: str) -> None:
    low, high = RANGES[told]
    schedule = FlowSchedule(5.0, sigma_min=low, sigma_max=high)
    shares = torch.linspace(0, 1, 11, dtype=torch.float64)
    sigma = schedule.sigma_at(shares)
    # SD3's shift (arXiv:2403.03206, Eq. 23) of equal steps between the unshifted ends
    ends = [end / (5.0 - 4.0 * end) for end in (low, high)]
    unshifted = ends[0] + (ends[1] - ends[0]) * shares
    torch.testing.assert_close(sigma, 5 * unshifted / (1 + 4 * unshifted), rtol=0, atol=1e-14)
    torch.testing.assert_close(schedule.share_of(sigma), shares, rtol=0, atol=1e-12)
    times = schedule.trailing(4)
    assert float(times[0]) == pytest.approx(1000 * high) and bool((times > 1000 * low).all())
    drawn = UniformTime()(schedule, torch.rand(100, dtype=torch.float64))
    assert low < float(drawn.min()) and float(drawn.max()) < high


def test_the_whole_range_is_as_it_was_to_the_bit() -> None:
    shares = torch.rand(50, dtype=torch.float64)
    assert torch.equal(FlowSchedule(3.0).sigma_at(shares), 3.0 * shares / (1 + 2.0 * shares))


class Expert:
    """D of data N(m, 1): x0 = m + (1 - s)(x - (1 - s) m) / ((1 - s)^2 + s^2), in closed form."""

    guidance, token_norm = "cfg", 0

    def __init__(self, schedule: FlowSchedule, mean: float) -> None:
        self.schedule, self.mean = schedule, mean

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, cond: Any) -> torch.Tensor:
        s = sigma.double()[:, None, None, None]
        return self.mean + (1 - s) * (x - (1 - s) * self.mean) / ((1 - s) ** 2 + s**2)


@pytest.mark.parametrize("renoise", [False, True])
def test_two_recipes_one_after_the_other_are_one_of_all_their_steps(renoise: bool) -> None:
    schedule, noise = FlowSchedule(5.0), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    fresh = [torch.randn_like(noise) for _ in range(4)]
    times = torch.tensor([1000.0, 937.5, 2500 / 3, 625.0], dtype=torch.float64)
    told: dict[str, Any] = {"family": "wan", "renoise": renoise}
    whole = Recipe.at(schedule, times, **told)
    high = replace(Recipe.at(schedule, times[:2], **told), end=float(times[2]))
    low = Recipe.at(schedule, times[2:], **told)
    expert: Any = Expert(schedule, 1.5)
    expected = sample(expert, whole, None, noise, lambda step: fresh[step])  # type: ignore[arg-type]
    left = sample(expert, high, None, noise, lambda step: fresh[step])  # type: ignore[arg-type]
    # unit noise is what a recipe begins with, scaled by its own rule
    sigma = low.levels(schedule)[0]
    begun = left / (low.initial_noise_scale * ((1 - sigma) ** 2 + sigma**2).sqrt())
    found = sample(expert, low, None, begun, lambda step: fresh[2 + step])  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert float((left - expected).abs().max()) > 0.1


def test_a_teacher_of_a_range_answers_at_its_least_noisy_level() -> None:
    schedule = FlowSchedule(5.0, sigma_min=0.875)
    expert: Any = Expert(schedule, 1.5)
    noise = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    found = teacher_sample(expert, None, None, noise, 2, 1.0)  # type: ignore[arg-type]
    first, second = schedule.sigma_of_time(schedule.trailing(2))
    x = jump(schedule, noise, expert(noise, first.expand(2), None), first.expand(2), second.expand(2))
    torch.testing.assert_close(found, expert(x, second.expand(2), None), rtol=0, atol=1e-12)
    assert 0.875 < float(second) < 1


@pytest.mark.parametrize("told", RANGES)
def test_a_run_learns_in_its_range_and_its_file_says_where_it_ends(told: str, tmp_path: Path) -> None:
    host, (low, high) = adapt(make("wan", flow_shift=5.0)), RANGES[told]
    levels: list[float] = []
    inner = host.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: levels.append(float((args[1] if len(args) > 1 else kwargs["timestep"]).max())),
        with_kwargs=True,
    )
    settings = settings_for(
        "dmd",
        **{"noise_range": told, "sizes": "48x32", "student_steps": 2, "rank": 2, "steps": 2, "batch": 2, "pairs": 2},
        **{"warm_start": 1, "critic_warm_up": 1, "critic_updates": 1, "teacher_steps": 2, "watch_every": 0},
        **{"preview_every": 0},
    )
    before = host.denoiser.schedule
    made = distil(host, ["a cat", "red dog"], settings, tmp_path / "run")
    inner.remove()
    assert host.denoiser.schedule == before == FlowSchedule(5.0)
    assert made.recipe.end == 1000 * low and made.recipe.timesteps[0] == pytest.approx(1000 * high)
    assert min(made.recipe.timesteps) > 1000 * low
    assert len(levels) > 10 and 1000 * low <= min(levels) and max(levels) <= 1000 * high + 1e-3


def test_a_grid_ends_where_the_range_does() -> None:
    """So does its last phase."""
    schedule = FlowSchedule(5.0, sigma_min=0.875)
    recipe = Recipe.for_student(schedule, 2, "wan", ((48, 32),))
    levels = Grid(recipe, 3).levels(schedule)
    assert int(PhaseEnd(2)(None, torch.tensor(5), torch.tensor(6), 6)) == 6  # type: ignore[arg-type]
    assert float(levels[-1]) == 0.875 and bool((levels[1:] < levels[:-1]).all())
    torch.testing.assert_close(levels[:-1:3], recipe.levels(schedule), rtol=0, atol=0)
    # between a step's two levels equally far apart
    torch.testing.assert_close(levels[3:], torch.lerp(levels[3], levels[6], torch.arange(4, dtype=torch.float64) / 3))
    assert float(Grid(recipe, 3).levels(FlowSchedule(5.0))[-1]) == 0
    assert float(Grid(Recipe.at(VP, VP.trailing(2)), 3).levels(VP)[-1]) == 0


VP = VPSchedule.scaled_linear()


PROMPTS = ["a cat", "red birds"]
TO_THE_PICTURE = (
    "lcm",
    "dcm",
    "scott",
    "ict",
    "ect",
    "scm",
    "meanflow",
    "twinflow",
    "boot",
    "rcm",
    "anyflow",
    "sana-sprint",
)


@pytest.mark.parametrize("method", narrowed((name for name in METHODS if METHODS[name].makes == "LoRA"), "pcm", "lcm"))
def test_every_method_asks_an_expert_for_nothing_else_or_refuses(method: str, tmp_path: Path) -> None:
    host = adapt(make("wan", flow_shift=5.0))
    levels: list[Any] = []
    host.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: levels.append(args[1] if len(args) > 1 else kwargs["timestep"]), with_kwargs=True
    )
    told = {"student_steps": 2, "rank": 2, "steps": 4, "batch": 2, "pairs": 2, "teacher_steps": 2, "watch_every": 0}
    told |= {"preview_every": 0} | short(method, tmp_path / "own") | {"noise_range": "0.875-1", "sizes": "48x32"}
    if method in TO_THE_PICTURE:
        with pytest.raises(OneStepError, match="leads from every noise level to the picture, and noise_range 0.875-1"):
            distil(host, PROMPTS, settings_for(**told), tmp_path / "run")
        assert not levels
        return
    made = distil(host, PROMPTS, settings_for(**told), tmp_path / "run")
    seen = torch.cat([level.flatten().double() for level in levels])
    assert float(seen.min()) >= 875 and float(seen.max()) <= 1000 + 1e-3
    assert made.recipe.end == 875


def host_of(name: str, family: str, schedule: Any) -> Any:
    return SimpleNamespace(name=name, family=family, denoiser=SimpleNamespace(schedule=schedule))


def test_what_no_range_is_for_is_refused() -> None:
    for wrong in ("1-0.875", "high", "0.5", "0-2"):
        with pytest.raises(OneStepError, match="must be LOW-HIGH within 0 and 1"):
            settings_for("dmd", noise_range=wrong)
    settings, whole = settings_for("dmd", noise_range="0.875-1"), settings_for("dmd")
    host = host_of("sd15", "unet", VPSchedule.scaled_linear())
    with pytest.raises(OneStepError, match="noise_range is for one of a flow model's"), within_range(host, settings):
        pass
    host = host_of("wan2.2_t2v_high_noise_14B_fp8", "wan", FlowSchedule(8.0))
    with pytest.raises(OneStepError, match="from 0.875 on: set noise_range to 0.875-1"), within_range(host, whole):
        pass
    with within_range(host, settings):
        assert host.denoiser.schedule.sigma_min == 0.875
    with within_range(host_of("wan2.2_t2v_low_noise_14B", "wan", FlowSchedule(8.0)), whole):
        pass
    other = Recipe.at(FlowSchedule(5.0), torch.tensor([800.0], dtype=torch.float64), family="wan")
    with pytest.raises(OneStepError, match="do not lie within noise_range 0.875-1"):
        ended(host, settings, other)


@pytest.mark.parametrize("end", [500.0, 700.0, -1.0, "x"])
def test_an_end_above_the_last_time_is_refused(end: Any) -> None:
    recipe = Recipe.at(FlowSchedule(5.0), torch.tensor([1000.0, 500.0], dtype=torch.float64), family="wan")
    with pytest.raises(OneStepError, match="recipe's end"):
        replace(recipe, end=end)
    assert Recipe.from_json(replace(recipe, end=400.0).to_json()).end == 400.0
