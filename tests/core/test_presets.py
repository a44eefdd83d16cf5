"""The public few-step models' sampling, against the schedulers and the code that their authors name."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from onestep.core.cond import Cond
from onestep.core.denoiser import EpsDenoiser
from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES
from onestep.core.recipe import PRESETS, Recipe, recipe_of
from onestep.core.recipe.by_name import presets_by_name
from onestep.core.roles import Roles
from onestep.core.sampling import sample
from onestep.core.schedule import VPSchedule
from onestep.core.step_numbers import step_numbers

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


def flow(shift: float, steps: int) -> list[float]:
    return times_of(FlowMatchEulerDiscreteScheduler(shift=shift), steps)


def dynamic(steps: int, mu: float) -> list[float]:
    """As the pipelines of Flux call it: their own even sigmas, and mu."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    return scheduler.timesteps.double().tolist()


def nitro(steps: int) -> list[float]:
    """original_inference_steps = 4."""
    return times_of(LCMScheduler(**STABLE_DIFFUSION, original_inference_steps=4), steps)


def dpm_flow(steps: int, shift: float) -> list[float]:
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction")
    scheduler.set_timesteps(steps)
    return (1000 * scheduler.sigmas[:-1].double()).tolist()


def pcm_grid(shift: float, steps: int) -> list[float]:
    """PCM's of SD3: of the times 20, 40, ... 1000 each (50 / steps)th from above, rounded down; then the shift."""
    shares = np.arange(1000, 0, -20)[np.floor(np.linspace(0, 50, steps, endpoint=False)).astype(int)] / 1000
    return list(1000 * shift * shares / (1 + (shift - 1) * shares))


def lightx2v() -> list[float]:
    """Of 1000 even sigmas from 1, shifted by 5, those at the indices 1000 - (1000, 750, 500, 250)."""
    sigmas = np.linspace(1, 0, 1001)[:-1]
    return list(1000 * (5 * sigmas / (1 + 4 * sigmas))[[0, 250, 500, 750]])


# The calls of the model cards; where those name no scheduler of diffusers, their authors' code, written out.
CARDS = {
    "sd-turbo-1": euler(1),
    "sdxl-turbo-1": euler(1),
    "lcm-4": lcm(4),
    "tcd-4": times_of(TCDScheduler(**STABLE_DIFFUSION), 4),
    **{f"sdxl-lightning-{steps}": euler(steps) for steps in (1, 2, 4, 8)},
    "hyper-sd-1-lora": times_of(TCDScheduler(**STABLE_DIFFUSION), 1),
    **{f"hyper-sd-{steps}-lora": ddim(steps) for steps in (2, 4, 8)},
    **{f"hyper-sd-{steps}-cfg": ddim(steps) for steps in (8, 12)},
    "hyper-sdxl-1-unet": lcm(timesteps=[800]),
    **{f"pcm-{steps}": ddim(steps) for steps in (2, 4, 8, 16)},
    **{f"pcm-{steps}-cfg": ddim(steps) for steps in (4, 8, 16)},
    "pcm-lcm-4": lcm(4),
    "flash-4": times_of(LCMScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing"), 4),
    **{f"nitrosd-{name}-{steps}": nitro(steps) for name in ("realism", "vibrant") for steps in (1, 2, 4)},
    "sdxs-1": euler(1),
    "dmd2-1": lcm(timesteps=[399]),
    "dmd2-4": lcm(timesteps=[999, 749, 499, 249]),
    "tdm-sd15-4": times_of(DPMSolverMultistepScheduler(**STABLE_DIFFUSION, steps_offset=1), 4),
    "flux-schnell-4": list(1000 * np.linspace(1, 0, 5)[:-1]),
    "hyper-flux-8": dynamic(8, 1.15),
    "hyper-flux-16": dynamic(16, 1.15),
    "flux-turbo-alpha-8": dynamic(8, 1.15),
    "sd3.5-turbo-4": flow(3.0, 4),
    **{f"hyper-sd3-{steps}-cfg": flow(3.0, steps) for steps in (4, 8, 16)},
    "pcm-sd3-2": pcm_grid(1.0, 2),
    "pcm-sd3-4": pcm_grid(3.0, 4),
    "pcm-sd3-4-shift1": pcm_grid(1.0, 4),
    "pcm-sd3-4-stochastic": pcm_grid(3.0, 4),
    "tdm-sd3-4": dpm_flow(4, 6.0),
    "z-image-turbo-8": dynamic(8, math.log(3)),
    "flux2-klein-4": dynamic(4, compute_empirical_mu(4096, 4)),
    "qwen-image-lightning-4": dynamic(4, math.log(3)),
    "qwen-image-lightning-8": dynamic(8, math.log(3)),
    **{f"anima-turbo-{steps}": dynamic(steps, math.log(3)) for steps in (4, 8)},
    "krea2-turbo-8": dynamic(8, 1.15),
    "wan2.1-lightx2v-4": lightx2v(),
    "wan2.2-lightx2v-4": lightx2v(),
    "wan2.2-lightx2v-high-2": lightx2v()[:2],
    "wan2.2-lightx2v-low-2": lightx2v()[2:],
    **{f"{name}-3": [1000.0, 757.0, 522.0] for name in ("fastwan", "causvid")},
    "causvid-9": [999.0, 934.0, 862.0, 756.0, 603.0, 410.0, 250.0, 140.0, 74.0],
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_times_are_its_sources(name: str) -> None:
    preset = PRESETS[name]
    np.testing.assert_allclose(preset.timesteps, CARDS[name], rtol=1e-6)
    numbers = [int(part) for part in name.split("-") if part.isdigit()]
    assert preset.steps == len(CARDS[name]) == numbers[-1]
    assert re.search(r"[\w.-]+/[\w.-]+|diffusers, pipeline", preset.source), "an address, or a repository and its file"


def test_every_card_has_its_preset() -> None:
    assert set(CARDS) == set(PRESETS) and all(preset.family in FAMILIES for preset in PRESETS.values())


GUIDED = {
    **{"hyper-sd-8-cfg": 5.0, "hyper-sd-12-cfg": 5.0, "pcm-4-cfg": 3.0, "pcm-8-cfg": 4.5, "pcm-16-cfg": 7.5},
    **{"hyper-sd3-4-cfg": 3.0, "hyper-sd3-8-cfg": 5.0, "hyper-sd3-16-cfg": 7.0},
    **{"pcm-sd3-2": 1.2, "pcm-sd3-4": 1.2, "pcm-sd3-4-shift1": 1.2, "pcm-sd3-4-stochastic": 1.2},
}
NITRO = {f"nitrosd-{name}-{steps}" for name in ("realism", "vibrant") for steps in (2, 4)}
RENOISED = {"lcm-4", "dmd2-4", "pcm-lcm-4", "flash-4", "pcm-sd3-4-stochastic", "wan2.1-lightx2v-4", "fastwan-3", *NITRO}
RENOISED |= {"causvid-3", "causvid-9"}
EIGHTH = {"hyper-flux-8", "hyper-flux-16", "hyper-sd3-4-cfg", "hyper-sd3-8-cfg", "hyper-sd3-16-cfg", "tdm-sd3-4"}


def test_what_differs_besides_the_times() -> None:
    assert {name for name, preset in PRESETS.items() if preset.renoise} == RENOISED
    assert {name: preset.eta for name, preset in PRESETS.items() if preset.eta} == {"tcd-4": 0.3, "hyper-sd-1-lora": 1}
    assert [name for name, preset in PRESETS.items() if preset.prediction] == ["sdxl-lightning-1"]
    assert {name: preset.guidance for name, preset in PRESETS.items() if preset.guidance != 1} == GUIDED
    assert {preset.lora_scale for preset in PRESETS.values()} == {1, 0.125}
    assert {name for name, preset in PRESETS.items() if preset.lora_scale != 1} == EIGHTH
    scaled = {name: preset.time_scale for name, preset in PRESETS.items() if preset.time_scale != 1}
    shifts = {"realism": 0.25, "vibrant": 0.5}
    assert scaled == {f"nitrosd-{name}-{steps}": share for name, share in shifts.items() for steps in (1, 2, 4)}


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("nitrosd")])
def test_nitrosds_network_is_given_the_shifted_times(name: str) -> None:
    """README: (timesteps * shifted_timestep / num_train_timesteps).long(), at the levels of the times themselves."""
    preset, schedule = PRESETS[name], VPSchedule.scaled_linear()
    given: list[float] = []

    def network(x: Tensor, time: Tensor, cond: Any) -> Tensor:
        given.append(float(time[0]))
        return 0.1 * x + time.reshape(-1, 1, 1, 1) / 1000

    denoise = EpsDenoiser(network, schedule, Roles([]), time_scale=preset.time_scale)
    noise, fresh = torch.randn(4, 1, 1, 2, 2, generator=torch.Generator().manual_seed(3)), iter(range(1, 4))
    drawn = sample(denoise, preset, Cond(torch.zeros(1, 1, 1)), noise[0], lambda step: noise[next(fresh)])

    times = torch.tensor(nitro(preset.steps))
    shifted = (times * (250 if "realism" in name else 500) / 1000).long()
    abar = LCMScheduler(**STABLE_DIFFUSION).alphas_cumprod.double()[times.long()]
    x = noise[0].double()
    for step, (a, s) in enumerate(zip(abar.sqrt(), (1 - abar).sqrt(), strict=True)):
        x0 = (x - s * (0.1 * x + shifted[step] / 1000)) / a
        if step + 1 < preset.steps:
            x = abar[step + 1].sqrt() * x0 + (1 - abar[step + 1]).sqrt() * noise[step + 1]
    assert given == shifted.tolist()
    torch.testing.assert_close(drawn, x0.float(), rtol=1e-4, atol=1e-4)


def test_a_times_share_is_in_the_numbers_of_fast_drawing_too() -> None:
    denoise = EpsDenoiser(lambda *given: given[0], VPSchedule.scaled_linear(), Roles([]), time_scale=0.25)
    assert [step.time for step in step_numbers(denoise, PRESETS["nitrosd-realism-4"])] == [249, 187, 124, 62]


def test_turbos_times_are_stabilitys_code_too() -> None:
    np.testing.assert_allclose(CARDS["sd3.5-turbo-4"], stability_times(4, 3.0), rtol=1e-6)


def test_presets_survive_a_file() -> None:
    for name, preset in PRESETS.items():
        assert Recipe.from_json(preset.to_json()) == preset == recipe_of(name) == recipe_of(preset.to_json())
    newer = PRESETS["lcm-4"].to_json().replace('"unet"', '"a newer one"')
    with pytest.raises(OneStepError, match="for 'a newer one' models, which are not served: update OneStep"):
        Recipe.from_json(newer)


@pytest.mark.parametrize("name", [None, "", "lcm", "LCM-4", "x" * 5000])
def test_an_unknown_preset_is_refused_with_the_known(name: str | None) -> None:
    with pytest.raises(OneStepError, match="lcm-4") as caught:
        recipe_of(name)
    assert len(str(caught.value)) < 600


def test_the_page_has_every_recipe_as_it_is(root: Path) -> None:
    """docs/public-few-step-models.md: its names, steps, guidance and strength, in the order of the data."""
    lines = (root / "docs" / "public-few-step-models.md").read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    table = {cells[0]: cells for cells in rows if cells[0] in PRESETS}
    assert set(table) == set(PRESETS) and all(len(cells) == 8 for cells in table.values())
    for name, cells in table.items():
        preset, strength = PRESETS[name], re.search(r"strength ([\d.]+)", cells[4])
        assert int(cells[3]) == preset.steps and float(cells[4].split(",")[0].split(" ")[0]) == preset.guidance, name
        assert float(strength[1] if strength else 1) == preset.lora_scale, name
        assert cells[7] in preset.source and all(cells)
        # NitroSD's one file is for 1 to 4 steps
        one = re.sub(r"(?<=^nitrosd-)(\w+)-\d", r"\1-1", name)
        assert presets_by_name(cells[2].split("`")[1]) == (one,), name
