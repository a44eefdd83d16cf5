"""The public few-step models' sampling, against the schedulers and the code that their authors name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from onestep.core.errors import OneStepError
from onestep.core.recipe import PRESETS, Recipe, recipe_of

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def times_of(scheduler: Any, *steps: int, **arguments: Any) -> list[float]:
    scheduler.set_timesteps(*steps, **arguments)
    return scheduler.timesteps.double().tolist()


def ddim(steps: int) -> list[float]:
    return times_of(DDIMScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing"), steps)


def euler(steps: int) -> list[float]:
    return times_of(EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing"), steps)


def lcm(*steps: int, **arguments: Any) -> list[float]:
    return times_of(LCMScheduler(**STABLE_DIFFUSION), *steps, **arguments)


def stability_times(steps: int, shift: float) -> list[float]:
    """get_sigmas of Stability's sd3_infer.py: the table's ends, spaced evenly, go through the shift a second time."""

    def sigma(time: Any) -> Any:
        return shift * time / 1000 / (1 + (shift - 1) * time / 1000)

    return list(1000 * sigma(np.linspace(1000 * sigma(1000.0), 1000 * sigma(1.0), steps)))


# The calls of the model cards; Stability's own turbo demo and Black Forest Labs' get_schedule, written out.
CARDS = {
    "sd-turbo-1": euler(1),
    "sdxl-turbo-1": euler(1),
    "lcm-4": lcm(4),
    "tcd-4": times_of(TCDScheduler(**STABLE_DIFFUSION), 4),
    "sdxl-lightning-1": euler(1),
    "sdxl-lightning-2": euler(2),
    "sdxl-lightning-4": euler(4),
    "sdxl-lightning-8": euler(8),
    "hyper-sd-1-lora": times_of(TCDScheduler(**STABLE_DIFFUSION), 1),
    "hyper-sd-2-lora": ddim(2),
    "hyper-sd-4-lora": ddim(4),
    "hyper-sd-8-lora": ddim(8),
    "hyper-sdxl-1-unet": lcm(timesteps=[800]),
    "dmd2-1": lcm(timesteps=[399]),
    "dmd2-4": lcm(timesteps=[999, 749, 499, 249]),
    "flux-schnell-4": list(1000 * np.linspace(1, 0, 5)[:-1]),
    "sd3.5-turbo-4": times_of(FlowMatchEulerDiscreteScheduler(shift=3.0), 4),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_times_are_its_sources(name: str) -> None:
    preset = PRESETS[name]
    np.testing.assert_allclose(preset.timesteps, CARDS[name], rtol=1e-6)
    assert preset.steps == len(CARDS[name]) == int(name.split("-")[-2 if name.endswith(("lora", "unet")) else -1])
    assert preset.guidance == 1 and preset.lora_scale == 1 and preset.source


def test_every_card_has_its_preset() -> None:
    assert set(CARDS) == set(PRESETS)


def test_what_differs_besides_the_times() -> None:
    assert [name for name, preset in PRESETS.items() if preset.renoise] == ["lcm-4", "dmd2-4"]
    assert {name: preset.eta for name, preset in PRESETS.items() if preset.eta} == {"tcd-4": 0.3, "hyper-sd-1-lora": 1}
    assert [name for name, preset in PRESETS.items() if preset.prediction] == ["sdxl-lightning-1"]
    assert {preset.shift for preset in PRESETS.values() if preset.family != "unet"} == {1.0, 3.0}


def test_turbos_times_are_stabilitys_code_too() -> None:
    np.testing.assert_allclose(CARDS["sd3.5-turbo-4"], stability_times(4, 3.0), rtol=1e-6)


def test_presets_survive_a_file() -> None:
    for name, preset in PRESETS.items():
        assert Recipe.from_json(preset.to_json()) == preset == recipe_of(name) == recipe_of(preset.to_json())


@pytest.mark.parametrize("name", [None, "", "lcm", "LCM-4", "x" * 5000])
def test_an_unknown_preset_is_refused_with_the_known(name: str | None) -> None:
    with pytest.raises(OneStepError, match="lcm-4") as caught:
        recipe_of(name)
    assert len(str(caught.value)) < 600
