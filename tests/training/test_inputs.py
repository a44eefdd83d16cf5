"""Where a student begins, and by what a run is known again."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from small_host import PROMPTS, SmallHost, small

from onestep.core.schedule import FlowSchedule, NoiseSchedule, VPSchedule
from onestep.training.engine.inputs import automatic_start, recipe_of
from onestep.training.runs.config import config_of


def test_one_step_of_stable_diffusion_begins_at_624() -> None:
    """SiD's sigma_init 2.5 (arXiv:2404.04057, section 5), or the nearest to it that KSampler (Advanced) begins at:
    t = 624, where sigma / alpha is 2.4925, with sigma noise."""
    recipe = recipe_of(SmallHost(), small(start=0.0))
    assert recipe.timesteps == (624.0,)
    assert recipe.initial_noise_scale == pytest.approx(2.4925 / math.hypot(1, 2.4925), abs=1e-5)
    assert recipe.log_snr[0] == pytest.approx(-math.log(2.4925), abs=1e-4)
    assert recipe_of(SmallHost(), small(start=1.0)).timesteps == (999.0,)
    assert recipe_of(SmallHost(), small(start=0.4)).timesteps == (400.0,)


@pytest.mark.parametrize("schedule", [FlowSchedule(), FlowSchedule(3.0), VPSchedule.scaled_linear(zero_terminal=True)])
def test_models_that_never_divide_by_alpha_begin_at_pure_noise(schedule: NoiseSchedule) -> None:
    assert automatic_start(schedule, 1) == 1


def test_several_steps_begin_at_pure_noise() -> None:
    assert automatic_start(VPSchedule.scaled_linear(), 2) == 1
    assert recipe_of(SmallHost(), small(start=0.0, student_steps=2)).timesteps == (999.0, 499.0)


def test_a_run_is_known_by_settings_prompts_base_and_recipe() -> None:
    recipe = recipe_of(SmallHost(), small())
    config = config_of(SmallHost(), PROMPTS, small(), recipe)
    assert config == config_of(SmallHost(), list(PROMPTS), small(), recipe)
    for key, other in {
        "settings": config_of(SmallHost(), PROMPTS, small(rank=3), recipe),
        "prompts": config_of(SmallHost(), PROMPTS[::-1], small(), recipe),
        "base": config_of(SmallHost(seed=1), PROMPTS, small(), recipe),
        "recipe": config_of(SmallHost(), PROMPTS, small(), replace(recipe, renoise=True)),
    }.items():
        assert [name for name in config if config[name] != other[name]] == [key]
    assert {"torch", "python"} <= set(config["versions"]) and config["threads"] >= 1
