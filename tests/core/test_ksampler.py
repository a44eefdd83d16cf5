"""Which of ComfyUI's own nodes draw a recipe, against its scheduler and its samplers' first noise written in NumPy."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from narrowed import narrowed
from oracles import stable_diffusion_levels

from onestep.core.ksampler import CoreNodes, KSampler, KSamplerAdvanced, core_nodes, nearest_start, simple_times
from onestep.core.recipe import PRESETS, Recipe
from onestep.core.schedule import FlowSchedule, NoiseSchedule, VESchedule, VPSchedule, initial_noise_scale
from onestep.training.engine.inputs import automatic_start

VP = VPSchedule.scaled_linear()
LINEAR = VPSchedule.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
COSINE = VPSchedule(torch.cos(torch.linspace(0.02, 1.5, 400, dtype=torch.float64)) ** 2)  # of 400 times
ZERO = VPSchedule.scaled_linear(zero_terminal=True)


def table(schedule: NoiseSchedule) -> Any:
    """ComfyUI's model_sampling.sigmas, rising: ModelSamplingDiscrete's and ModelSamplingDiscreteFlow's."""
    if isinstance(schedule, FlowSchedule):
        u, shift = np.arange(1, 1001) / 1000, schedule.shift
        return shift * u / (1 + (shift - 1) * u)
    abar = schedule.alphas_cumprod.numpy()  # type: ignore[attr-defined]
    return np.sqrt((1 - abar) / np.maximum(abar, 4.8973451890853435e-08))


def simple_scheduler(sigmas: Any, steps: int) -> list[float]:
    """comfy.samplers.simple_scheduler, without its closing 0."""
    return [float(sigmas[-(1 + int(x * (len(sigmas) / steps)))]) for x in range(steps)]


def sigmas_of(recipe: Recipe, schedule: NoiseSchedule) -> list[float]:
    """Of its times, by the table."""
    if isinstance(schedule, FlowSchedule):
        return [time / 1000 for time in recipe.timesteps]
    return [float(table(schedule)[round(time)]) for time in recipe.timesteps]


def drawn_sigmas(node: KSampler | KSamplerAdvanced, schedule: NoiseSchedule) -> list[float]:
    """comfy.samplers.KSampler.sample's: cut off behind end_at_step, then before start_at_step."""
    sigmas = [*simple_scheduler(table(schedule), node.steps), 0.0]
    if isinstance(node, KSamplerAdvanced):
        assert node.add_noise == "enable" and node.return_with_leftover_noise == "disable"
        sigmas = [*sigmas[: node.end_at_step], 0.0][node.start_at_step :]
    return sigmas[:-1]


def test_the_automatic_start_of_stable_diffusion_is_step_3_of_8() -> None:
    """sigma 2.4925, time 624: the nearest to SiD's sigma_init 2.5 (arXiv:2404.04057) that KSampler begins a step at."""
    recipe = Recipe.for_student(VP, 1, "unet", ((512, 512),), automatic_start(VP, 1))
    alpha, sigma = stable_diffusion_levels(624)
    assert recipe.timesteps == (624.0,) and recipe.sigmas[0] == pytest.approx(sigma / alpha, rel=1e-9)
    assert round(sigma / alpha, 4) == 2.4925
    # sigma n in variance-exploding form is sigma n / sqrt(1 + sigma^2) as the network sees it
    assert recipe.initial_noise_scale == pytest.approx(2.4925 / np.hypot(1, 2.4925), rel=1e-4)
    core = core_nodes(recipe, VP)
    assert core.simple == KSamplerAdvanced(8, 1.0, "euler", 3, 4)
    assert core.general is not None and core.general.sigmas.startswith("2.492") and core.general.sigmas.endswith(", 0")
    words = str(core)
    for value in ("KSampler (Advanced)", "steps 8", "start_at_step 3", "end_at_step 4", "scheduler simple", "cfg 1,"):
        assert value in words
    assert "return_with_leftover_noise disable" in words and "add_noise enable" in words
    assert "RandomNoise" in words and f"ManualSigmas {core.general.sigmas}" in words


@pytest.mark.parametrize("schedule", [VP, LINEAR, COSINE], ids=["scaled linear", "linear", "400 times"])
def test_any_discrete_schedule_begins_where_ksampler_reaches(schedule: VPSchedule) -> None:
    """No (steps, start) of up to 20 steps comes nearer to 2.5, and KSampler (Advanced) of the recipe begins there."""
    recipe = Recipe.for_student(schedule, 1, "unet", ((64, 64),), automatic_start(schedule, 1))
    reached = [level for steps in range(1, 21) for level in simple_scheduler(table(schedule), steps)]
    nearest = min(reached, key=lambda level: abs(np.log(level / 2.5)))
    np.testing.assert_allclose(sigmas_of(recipe, schedule), [nearest], rtol=1e-9)
    node = core_nodes(recipe, schedule).simple
    assert isinstance(node, KSamplerAdvanced)
    np.testing.assert_allclose(drawn_sigmas(node, schedule), [nearest], rtol=1e-9)
    assert nearest_start(schedule, 2.5) == recipe.timesteps[0]


SCHEDULES: dict[str, NoiseSchedule] = {
    **{"vp": VP, "linear": LINEAR, "400 times": COSINE, "zero-terminal": ZERO},
    **{"flow": FlowSchedule(), "flow, shift 3": FlowSchedule(3.0)},
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
@pytest.mark.parametrize("start", [1.0, 0.0, 0.75, 0.4, 0.37])
@pytest.mark.parametrize("steps", narrowed([1, 2, 3, 4, 5, 6, 8], 1, 2, 4))
def test_what_is_named_visits_the_recipes_sigmas(schedule: NoiseSchedule, steps: int, start: float) -> None:
    """KSampler's where it is named, and ManualSigmas', for every student."""
    recipe = Recipe.for_student(schedule, steps, "unet", (), start or automatic_start(schedule, steps))
    core, wanted = core_nodes(recipe, schedule), sigmas_of(recipe, schedule)
    assert not core.reason and core.general is not None
    if core.simple is not None:
        np.testing.assert_allclose(drawn_sigmas(core.simple, schedule), wanted, rtol=1e-6)
    # nodes_custom_sampler.ManualSigmas
    read = [float(found) for found in re.findall(r"[-+]?(?:\d*\.*\d+)", core.general.sigmas)]
    np.testing.assert_allclose(np.float32(read), np.float32([*wanted, 0]), rtol=2e-7)
    assert {node.sampler_name for node in (core.simple, core.general) if node} == {"lcm" if steps > 1 else "euler"}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
@pytest.mark.parametrize("share", [1.0, 0.6, 0.2])
def test_a_student_begins_with_the_noise_that_comfyuis_samplers_begin_with(
    schedule: NoiseSchedule, share: float
) -> None:
    """EPS.noise_scaling and calculate_input: sigma n, or sqrt(1 + sigma^2) n at sigma_max, over sqrt(1 + sigma^2);
    CONST: sigma n, as it is."""
    recipe = Recipe.for_student(schedule, 1, "unet", (), share)
    sigma = sigmas_of(recipe, schedule)[0]
    level = recipe.levels(schedule)
    enters = recipe.initial_noise_scale * float((schedule.alpha(level) ** 2 + level**2).sqrt())
    if isinstance(schedule, FlowSchedule):
        assert enters == pytest.approx(sigma, rel=1e-12)
    else:
        most = np.isclose(sigma, table(schedule)[-1], rtol=1e-5)
        assert enters == pytest.approx(1.0 if most else sigma / np.hypot(1, sigma), rel=1e-9)


def test_variance_exploding_noise_is_sigma_too() -> None:
    schedule = VESchedule(0.002, 80.0)
    assert initial_noise_scale(schedule, torch.tensor(80.0)) == 1
    assert initial_noise_scale(schedule, torch.tensor(3.0)) == pytest.approx(3 / np.hypot(1, 3))
    recipe = Recipe.for_student(schedule, 1, "unet", ())
    assert core_nodes(recipe, schedule).general is not None and core_nodes(recipe, schedule).simple is None


# -- the presets, and what core has no node for -----------------------------------------------------------------------

SAMPLERS = {
    "sd-turbo-1": KSampler(1, 1.0, "euler"),
    "sdxl-turbo-1": KSampler(1, 1.0, "euler"),
    "sdxl-lightning-2": KSampler(2, 1.0, "euler"),
    "sdxl-lightning-4": KSampler(4, 1.0, "euler"),
    "sdxl-lightning-8": KSampler(8, 1.0, "euler"),
    "hyper-sd-1-lora": KSampler(1, 1.0, "euler"),
    "hyper-sd-2-lora": KSampler(2, 1.0, "euler"),
    "hyper-sd-4-lora": KSampler(4, 1.0, "euler"),
    "hyper-sd-8-lora": KSampler(8, 1.0, "euler"),
    "hyper-sd-8-cfg": KSampler(8, 5.0, "euler"),
    "pcm-4": KSampler(4, 1.0, "euler"),
    "pcm-8-cfg": KSampler(8, 4.5, "euler"),
    "sdxs-1": KSampler(1, 1.0, "euler"),
    "dmd2-4": KSampler(4, 1.0, "lcm"),
    "flux-schnell-4": KSampler(4, 1.0, "euler"),
}
REASONS = {"tcd-4": "eta 0.3", "sdxl-lightning-1": "needs ModelSamplingDiscrete", "dmd2-1": "this recipe with 1"}
REASONS["hyper-sdxl-1-unet"] = REASONS["dmd2-1"]
REASONS["nitrosd-realism-1"], REASONS["nitrosd-vibrant-4"] = "is given 0.25 of each time", "is given 0.5 of each time"


def found(name: str) -> CoreNodes:
    preset = PRESETS[name]
    return core_nodes(preset, VP if preset.shift is None else FlowSchedule(preset.shift))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_preset_that_ksampler_draws(name: str) -> None:
    assert found(name).simple == SAMPLERS[name]
    assert str(found(name)).startswith("KSampler with steps ") and "Manual" not in str(found(name))


@pytest.mark.parametrize("name", REASONS)
def test_a_preset_that_no_node_of_core_draws(name: str) -> None:
    core = found(name)
    assert core.simple is core.general is None and REASONS[name] in core.reason and str(core) == core.reason


def test_loras_of_flux_dev_go_by_its_own_schedule() -> None:
    """ComfyUI's ModelSamplingFlux at its default, mu = 1.15; 16 steps do not divide its table."""
    own = FlowSchedule(math.exp(1.15))
    assert core_nodes(PRESETS["flux-turbo-alpha-8"], own).simple == KSampler(8, 1.0, "euler")
    assert core_nodes(PRESETS["hyper-flux-8"], own).simple == KSampler(8, 1.0, "euler")
    sixteen = core_nodes(PRESETS["hyper-flux-16"], own)
    assert sixteen.simple is None and sixteen.general is not None and sixteen.general.sampler_name == "euler"


def test_times_that_no_scheduler_visits_go_by_their_sigmas() -> None:
    """LCM's 999, 759, 499, 259."""
    core = found("lcm-4")
    assert core.simple is None and core.general is not None and core.general.sampler_name == "lcm"
    np.testing.assert_allclose(
        [float(sigma) for sigma in core.general.sigmas.split(", ")],
        [*(sigma / alpha for alpha, sigma in map(stable_diffusion_levels, (999, 759, 499, 259))), 0],
        rtol=1e-8,
    )
    assert str(core).startswith("RandomNoise, BasicGuider, KSamplerSelect lcm")
    turbo = found("sd3.5-turbo-4")
    assert turbo.simple is None and turbo.general is not None and turbo.general.sampler_name == "euler"
    assert turbo.general.sigmas == "1, 0.85769232, 0.60215057, 0.008928572, 0"


def test_what_a_recipe_asks_of_the_widgets() -> None:
    two = Recipe((999.0, 499.0))
    assert core_nodes(dataclasses.replace(two, eta=1.0), VP).simple == KSampler(2, 1.0, "lcm")
    assert core_nodes(dataclasses.replace(two, guidance=2.5), VP).simple == KSampler(2, 2.5, "euler")
    assert "CFGGuider at cfg 2.5" in str(core_nodes(Recipe((999.0, 759.0), guidance=2.5), VP))
    # no other noise than core's own
    assert "of unit noise at time 999, this recipe with 0.5" in core_nodes(Recipe((999.0,), 0.5), VP).reason
    assert "0.928 of unit noise at time 625" in core_nodes(Recipe((625.0,)), VP).reason.replace("0.9286", "0.928")


def test_the_grid_is_comfyuis_simple_scheduler() -> None:
    for schedule in (VP, COSINE, FlowSchedule(3.0)):
        for steps in (1, 3, 7, 8, 20):
            times = simple_times(schedule, steps)
            wanted = simple_scheduler(table(schedule), steps)
            np.testing.assert_allclose(sigmas_of(Recipe(tuple(times.tolist())), schedule), wanted, rtol=1e-9)
