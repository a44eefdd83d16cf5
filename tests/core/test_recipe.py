"""Recipes survive their file, refuse nonsense, express the public few-step models, and say what KSampler can do."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler
from oracles import stable_diffusion_levels

from onestep.core.errors import OneStepError
from onestep.core.presets import PRESETS
from onestep.core.recipe import KSampler, Recipe
from onestep.core.schedule import FlowSchedule, VESchedule, VPSchedule

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = VPSchedule.scaled_linear()


def full() -> Recipe:
    """No field at its default."""
    return Recipe(
        **{"told": (999.0, 499.0), "fed": (1.0, 0.9), "log_snr": (None, -0.47), "renoise": True, "eta": 0.25},
        **{"guidance": 1.5, "lora_scale": 0.8, "sizes": ((512, 512), (640, 448)), "family": "sd3"},
        **{"prediction": "sample", "shift": 3.0, "teacher_loras": ("style.safetensors:0.7",), "source": "a test"},
    )


def test_every_field_survives_the_file() -> None:
    assert all(getattr(full(), field.name) != field.default for field in dataclasses.fields(Recipe))
    assert Recipe.from_json(full().to_json()) == full()
    for recipe in PRESETS.values():
        assert Recipe.from_json(recipe.to_json()) == recipe


def test_the_text_is_json_that_every_parser_reads() -> None:
    """No NaN and no Infinity: browsers refuse them."""
    recipe = Recipe.for_student(VPSchedule.scaled_linear(zero_terminal=True), 2, "unet", ((64, 64),))
    assert recipe.log_snr[0] is None and recipe.log_snr[1] is not None
    json.loads(recipe.to_json(), parse_constant=pytest.fail)


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(full().to_json()), **changes})


@pytest.mark.parametrize(
    "text",
    [
        *("", "null", "5", "[]", '"told"', "{}", "{", "[" * 100_000, '{"version": 1}', '{"version": 1, "told": [999]}'),
        *(changed(version=2), changed(version=None), changed(version="9" * 5000), changed(surprise=1)),
        *(changed(told=[]), changed(told=999), changed(told="999"), changed(told=["999", "499"]), changed(told=None)),
        *(changed(told=[499, 999]), changed(told=[999, 999]), changed(told=[999, float("nan")])),
        *(changed(told=[float("inf"), 1]), changed(told=[True, 0]), changed(told=[10**400, 1]), changed(told={"a": 1})),
        *(changed(told=list(range(100, 0, -1)), fed=[1] * 100), changed(fed=[1]), changed(fed=[1, "1"])),
        *(changed(log_snr=[0.1]), changed(log_snr=["a", 1]), changed(eta=2), changed(eta=-0.1), changed(eta="0")),
        *(changed(eta=float("nan")), changed(guidance="4"), changed(guidance=None), changed(lora_scale=[1])),
        *(changed(family="sd4"), changed(family=None), changed(family=[1]), changed(family="x" * 5000)),
        *(changed(sizes=[512, 512]), changed(sizes=[["a", 1]]), changed(sizes=5), changed(shift="3")),
        *(changed(prediction=5), changed(teacher_loras=[5]), changed(teacher_loras=5), changed(source=None)),
        *(changed(**{"x" * 5000: 1}), changed(**{f"field {index}": 1 for index in range(500)})),
    ],
    ids=lambda text: text[:40],
)
def test_what_is_no_recipe_is_refused_with_a_word(text: str) -> None:
    with pytest.raises(OneStepError) as caught:
        Recipe.from_json(text)
    assert 20 < len(str(caught.value)) < 400


# -- the student's own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "told"), [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])])
def test_a_students_recipe_on_a_u_net(steps: int, told: list[int]) -> None:
    recipe = Recipe.for_student(SCHEDULE, steps, "unet", ((64, 64),))
    levels = [stable_diffusion_levels(time) for time in told]
    assert recipe.told == tuple(map(float, told)) and recipe.fed == (1.0,) * steps and recipe.steps == steps
    np.testing.assert_allclose(recipe.log_snr, [math.log(alpha / sigma) for alpha, sigma in levels], rtol=1e-12)  # type: ignore[arg-type]
    assert recipe.renoise == (steps > 1)


def test_a_students_recipe_on_a_flow_model() -> None:
    """t = 1, .9, .75, .5 at shift 3; the log-SNR of pure noise is written as None."""
    recipe = Recipe.for_student(FlowSchedule(3.0), 4, "sd3", ((64, 64),))
    np.testing.assert_allclose(recipe.told, [1000, 900, 750, 500])
    assert recipe.log_snr[0] is None
    np.testing.assert_allclose(recipe.log_snr[1:], [math.log(1 / 9), math.log(1 / 3), 0], atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize(("start", "told"), [(0.4, [400]), (0.5, [500, 250])])
def test_a_student_may_start_below_pure_noise(start: float, told: list[int]) -> None:
    """Unit noise still, told a lower time (DMD2's 399, SiD's 625); KSampler cannot, and the recipe says so."""
    recipe = Recipe.for_student(SCHEDULE, len(told), "unet", ((64, 64),), start)
    assert recipe.told == tuple(map(float, told)) and set(recipe.fed) == {1.0}
    levels = [stable_diffusion_levels(time) for time in told]
    np.testing.assert_allclose(recipe.log_snr, [math.log(alpha / sigma) for alpha, sigma in levels], rtol=1e-12)  # type: ignore[arg-type]
    assert f"this recipe tells {told[0]}" in str(recipe.ksampler(SCHEDULE))


# -- the public models, after the schedulers that their model cards name ----------------------------------------------


def scheduler_times(scheduler: Any, **arguments: Any) -> list[float]:
    scheduler.set_timesteps(**arguments)
    return scheduler.timesteps.double().tolist()


def test_presets_tell_the_times_of_diffusers_schedulers() -> None:
    trailing = DDIMScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing")
    lcm, tcd = LCMScheduler(**STABLE_DIFFUSION), TCDScheduler(**STABLE_DIFFUSION)
    flow = [FlowMatchEulerDiscreteScheduler(shift=shift) for shift in (1.0, 3.0)]
    quarters = np.linspace(1, 0.25, 4)
    wanted = {
        "sd-turbo-1": scheduler_times(trailing, num_inference_steps=1),
        "sdxl-turbo-1": scheduler_times(trailing, num_inference_steps=1),
        "sdxl-lightning-1": scheduler_times(trailing, num_inference_steps=1),
        "sdxl-lightning-2": scheduler_times(trailing, num_inference_steps=2),
        "sdxl-lightning-4": scheduler_times(trailing, num_inference_steps=4),
        "lcm-4": scheduler_times(lcm, num_inference_steps=4),
        "tcd-4": scheduler_times(tcd, num_inference_steps=4),
        "hyper-sd-1": scheduler_times(tcd, timesteps=[800]),
        "dmd2-1": scheduler_times(lcm, timesteps=[399]),
        "dmd2-4": scheduler_times(lcm, timesteps=[999, 749, 499, 249]),
        "flux-schnell-4": scheduler_times(flow[0], sigmas=quarters),
        "sd3.5-turbo-4": scheduler_times(flow[1], sigmas=quarters),
    }
    assert set(wanted) == set(PRESETS)
    for name, times in wanted.items():
        np.testing.assert_allclose(PRESETS[name].told, times, rtol=1e-6, err_msg=name)
        assert PRESETS[name].fed == (1.0,) * len(times) and PRESETS[name].guidance == 1, name
    assert [name for name, preset in PRESETS.items() if preset.renoise] == ["lcm-4", "dmd2-4"]
    assert PRESETS["tcd-4"].eta == 0.3


# -- KSampler ---------------------------------------------------------------------------------------------------------

REASONS = {
    "lcm-4": "999, 749, 499, 249, this recipe tells 999, 759, 499, 259",
    "tcd-4": "this recipe tells 999, 759, 499, 259",
    "sdxl-lightning-1": "needs ModelSamplingDiscrete",
    "hyper-sd-1": "999, this recipe tells 800",
    "dmd2-1": "999, this recipe tells 399",
}
SAMPLERS = {
    "sd-turbo-1": KSampler(1, 1.0, "euler", "simple"),
    "sdxl-turbo-1": KSampler(1, 1.0, "euler", "simple"),
    "sdxl-lightning-2": KSampler(2, 1.0, "euler", "simple"),
    "sdxl-lightning-4": KSampler(4, 1.0, "euler", "simple"),
    "dmd2-4": KSampler(4, 1.0, "lcm", "simple"),
    "flux-schnell-4": KSampler(4, 1.0, "euler", "simple"),
    "sd3.5-turbo-4": KSampler(4, 1.0, "euler", "simple"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_ksampler_of_each_preset(name: str) -> None:
    preset = PRESETS[name]
    schedule = SCHEDULE if preset.shift is None else FlowSchedule(preset.shift)
    found = preset.ksampler(schedule)
    if name in SAMPLERS:
        assert found == SAMPLERS[name]
    else:
        assert isinstance(found, str) and REASONS[name] in found


def simple_times(steps: int) -> list[int]:
    """ComfyUI's simple_scheduler: sigmas[-(1 + int(x * len(sigmas) / steps))] of a table of 1000."""
    return [1000 - (1 + int(x * (1000 / steps))) for x in range(steps)]


@pytest.mark.parametrize("steps", range(1, 9))
def test_ksampler_is_promised_only_where_its_times_are_ours(steps: int) -> None:
    recipe = Recipe.for_student(SCHEDULE, steps, "unet", ((64, 64),))
    same = list(recipe.told) == simple_times(steps)
    assert isinstance(recipe.ksampler(SCHEDULE), KSampler) == same


def test_ksampler_names_what_it_cannot_do() -> None:
    one = Recipe((999.0,), (1.0,))
    assert "unit noise" in str(dataclasses.replace(one, fed=(0.5,)).ksampler(SCHEDULE))
    two = Recipe((999.0, 499.0), (1.0, 1.0))
    assert "eta 0.5" in str(dataclasses.replace(two, eta=0.5).ksampler(SCHEDULE))
    assert dataclasses.replace(two, eta=1.0).ksampler(SCHEDULE) == KSampler(2, 1.0, "lcm", "simple")
    assert dataclasses.replace(two, guidance=2.5).ksampler(SCHEDULE) == KSampler(2, 2.5, "euler", "simple")
    # a flow model of another shift has other times
    assert isinstance(PRESETS["sd3.5-turbo-4"].ksampler(FlowSchedule(1.0)), str)
    assert isinstance(Recipe.for_student(VESchedule(), 1, "unet", ()).ksampler(VESchedule()), KSampler)
    assert torch.tensor(two.told).tolist() == [999, 499]
