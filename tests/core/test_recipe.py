"""Recipes survive their file, are read in every version, and refuse nonsense."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import stable_diffusion_levels

from onestep.core.errors import OneStepError
from onestep.core.recipe import PRESETS, Recipe
from onestep.core.schedule import FlowSchedule, VPSchedule, initial_noise_scale

SCHEDULE = VPSchedule.scaled_linear()


def full() -> Recipe:
    """No field at its default."""
    return Recipe(
        **{"timesteps": (999.0, 499.0), "initial_noise_scale": 0.9, "log_snr": (None, -0.47), "sigmas": (None, 1.6)},
        **{"renoise": True, "eta": 0.25, "guidance": 1.5, "lora_scale": 0.8, "sizes": ((512, 512), (640, 448))},
        **{
            "family": "sd3",
            "prediction": "sample",
            "time_scale": 0.25,
            "shift": 3.0,
            "teacher_loras": ("style.safetensors:0.7",),
        },
        **{"files": ("a.safetensors", "a.safetensors"), "end": 400.0, "source": "a test"},
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
    assert recipe.sigmas[0] is None and recipe.sigmas[1] is not None
    json.loads(recipe.to_json(), parse_constant=pytest.fail)


VERSION_1 = json.loads((Path(__file__).parents[1] / "support" / "recipes_version_1.json").read_text())


@pytest.mark.parametrize("name", VERSION_1)
def test_version_1_is_read(name: str) -> None:
    """Texts as version 1 wrote them, of every preset and every kind of student: the same times, noise and rules."""
    old, read = json.loads(VERSION_1[name]), Recipe.from_json(VERSION_1[name])
    assert read.timesteps == tuple(old["told"]) and read.initial_noise_scale == old["fed"][0]
    assert read.log_snr == tuple(old["log_snr"]) and read.sizes == tuple(map(tuple, old["sizes"]))
    same = ("renoise", "eta", "guidance", "lora_scale", "family", "prediction", "shift", "source")
    assert {name: getattr(read, name) for name in same} == {name: old[name] for name in same}
    assert read.teacher_loras == tuple(old["teacher_loras"]) and read.sigmas == read.files == ()
    assert Recipe.from_json(read.to_json()) == read and json.loads(read.to_json())["version"] == 2


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(full().to_json()), **changes})


def old(**changes: Any) -> str:
    return json.dumps({**json.loads(VERSION_1["every field"]), **changes})


NO_RECIPES = [
    *("", "null", "5", "[]", '"timesteps"', "{}", "{", "[" * 100_000, '{"version": 2}', '{"version": 1}'),
    *(changed(version=3), changed(version=None), changed(version=True), changed(version="9" * 5000)),
    *(changed(surprise=1), changed(told=[999]), changed(version=1), changed(version=2.0)),
    *(changed(**{"x" * 5000: 1}), changed(**{f"field {index}": 1 for index in range(500)})),
    *(changed(timesteps=[]), changed(timesteps=999), changed(timesteps="999"), changed(timesteps=["999", "499"])),
    *(changed(timesteps=[499, 999]), changed(timesteps=[999, 999]), changed(timesteps=[999, float("nan")])),
    *(changed(timesteps=None), changed(timesteps=[float("inf"), 1]), changed(timesteps=[True, 0])),
    *(changed(timesteps=[10**400, 1]), changed(timesteps={"a": 1}), changed(timesteps=[1001, 1])),
    *(changed(timesteps=[999, -1]), changed(timesteps=list(range(100, 0, -1))), changed(timesteps=[[999], [1]])),
    *(changed(initial_noise_scale=value) for value in (0, -1, "1", None, [1], 10**400, float("nan"), True)),
    *(changed(log_snr=[0.1]), changed(log_snr=["a", 1]), changed(log_snr=[1, -1]), changed(log_snr=[1, None])),
    *(changed(sigmas=[1.0]), changed(sigmas=[1, 2]), changed(sigmas=[-1, -2]), changed(sigmas=[10**400, 1])),
    *(changed(sigmas=5), changed(sigmas=[2, float("nan")]), changed(log_snr=[-(10**400), 1])),
    *(changed(eta=2), changed(eta=-0.1), changed(eta="0"), changed(eta=float("nan")), changed(renoise=1)),
    *(changed(renoise="yes"), changed(guidance="4"), changed(guidance=None), changed(guidance=-1)),
    *(changed(guidance=1e300), changed(lora_scale=[1]), changed(lora_scale=1e9), changed(lora_scale=10**400)),
    *(changed(time_scale=value) for value in (0, 1.5, -1, "1", None, True, float("nan"))),
    *(changed(shift=value) for value in ("3", 0, -1, 10**400, float("nan"), [1], True)),
    *(changed(family="sd4"), changed(family=None), changed(family=[1]), changed(family="x" * 5000)),
    *(changed(sizes=[512, 512]), changed(sizes=[["a", 1]]), changed(sizes=5), changed(sizes=[[512]])),
    *(changed(sizes=[[512, value]]) for value in (0, -8, 511, 512.0, 16384, 10**400, None, True)),
    *(changed(sizes=[[512, 512]] * 1000), changed(sizes="512x512"), changed(sizes={"a": 1})),
    *(changed(prediction=5), changed(prediction="x0"), changed(prediction=["sample"]), changed(source=None)),
    *(changed(source="x" * 10_000), changed(teacher_loras=[5]), changed(teacher_loras=5), changed(source=[1])),
    *(changed(teacher_loras=["a"] * 1000), changed(files=["a"]), changed(files=5), changed(files=[1, 2])),
    *(old(fed=[1]), old(fed=[1, "1"]), old(fed=1), old(fed=[]), old(fed=None), old(told=999), old(told=None)),
    *(old(fed=[0, 1]), old(fed=[1, float("nan")]), old(fed=[10**400, 1]), old(told=[499, 999]), old(sigmas=[2, 1])),
    *(old(timesteps=[999, 499]), old(files=[]), old(surprise=1), old(sizes=[[511, 512]]), old(shift=0)),
]


@pytest.mark.parametrize("text", NO_RECIPES, ids=range(len(NO_RECIPES)))
def test_what_is_no_recipe_is_refused_with_a_word(text: str) -> None:
    with pytest.raises(OneStepError) as caught:
        Recipe.from_json(text)
    assert 20 < len(str(caught.value)) < 400


def test_each_step_may_have_a_file() -> None:
    read = Recipe.from_json(changed(files=["high.safetensors", "low.safetensors"]))
    assert read.files == ("high.safetensors", "low.safetensors")
    assert read.retimed((999.0,), 1.0).files == ()


@pytest.mark.parametrize("name", ["", "..", "a/b.safetensors", "..\\b.safetensors", "C:b", "/etc/passwd"])
def test_a_recipes_files_lie_beside_it(name: str) -> None:
    with pytest.raises(OneStepError, match="names without a folder"):
        Recipe.from_json(changed(files=["high.safetensors", name]))


# -- the student's own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "told"), [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])])
def test_a_students_recipe_on_a_u_net(steps: int, told: list[int]) -> None:
    recipe = Recipe.for_student(SCHEDULE, steps, "unet", ((64, 64),))
    levels = [stable_diffusion_levels(time) for time in told]
    assert recipe.timesteps == tuple(map(float, told)) and recipe.initial_noise_scale == 1 and recipe.steps == steps
    np.testing.assert_allclose(recipe.log_snr, [math.log(alpha / sigma) for alpha, sigma in levels], rtol=1e-12)  # type: ignore[arg-type]
    assert recipe.renoise == (steps > 1)


def test_a_students_recipe_on_a_flow_model() -> None:
    """t = 1, .9, .75, .5 at shift 3; the log-SNR of pure noise is written as None."""
    recipe = Recipe.for_student(FlowSchedule(3.0), 4, "sd3", ((64, 64),))
    np.testing.assert_allclose(recipe.timesteps, [1000, 900, 750, 500])
    assert recipe.log_snr[0] is None
    np.testing.assert_allclose(recipe.log_snr[1:], [math.log(1 / 9), math.log(1 / 3), 0], atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize(("start", "told"), [(0.4, [400]), (0.5, [500, 250])])
def test_a_student_may_start_below_pure_noise(start: float, told: list[int]) -> None:
    """At a lower time (DMD2's 399, SiD's 625), with sigma noise: sigma of unit noise where alpha^2 + sigma^2 = 1."""
    recipe = Recipe.for_student(SCHEDULE, len(told), "unet", ((64, 64),), start)
    levels = [stable_diffusion_levels(time) for time in told]
    assert recipe.timesteps == tuple(map(float, told))
    assert recipe.initial_noise_scale == pytest.approx(levels[0][1], rel=1e-12)
    np.testing.assert_allclose(recipe.sigmas, [sigma / alpha for alpha, sigma in levels], rtol=1e-12)  # type: ignore[arg-type]
    np.testing.assert_allclose(recipe.log_snr, [math.log(alpha / sigma) for alpha, sigma in levels], rtol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_a_share_of_the_first_time_is_one_step_from_there(strength: float) -> None:
    """A flow's time itself; of a table the trained one next to it. It begins as the whole recipe does."""
    flow = Recipe.for_student(FlowSchedule(3.0), 4, "sd3", ((64, 64),))
    assert flow.at_strength(FlowSchedule(3.0), strength).timesteps == pytest.approx((1000 * strength,))
    schedule = VPSchedule.scaled_linear()
    few = Recipe.for_student(schedule, 4, "unet", ((64, 64),))
    (time,) = few.at_strength(schedule, strength).timesteps
    assert abs(time - 999 * strength) <= 0.5 and time == round(time)
    found = few.at_strength(schedule, strength)
    assert found.steps == 1 and found.initial_noise_scale == pytest.approx(
        initial_noise_scale(schedule, found.levels(schedule)[0])
    )
