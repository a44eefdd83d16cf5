"""What a run starts from: a base that can be trained, and how the student will draw."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ...core.denoiser import EpsDenoiser
from ...core.errors import OneStepError
from ...core.ksampler import nearest_start
from ...core.licences import BASE
from ...core.recipe import Recipe
from ...core.recipe.distilled_base import few_step_kind
from ...core.schedule import FlowSchedule, NoiseSchedule, VPSchedule, of_size
from ...core.tensor_file import read_header
from ..host import Host
from ..settings import Settings
from .donor import AUTO, donor_recipe, student_of_donor

SIGMA_INIT = 2.5
PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_base(host: Host, settings: Settings) -> None:
    """Raises OneStepError where this checkpoint cannot be distilled by any method, or guided so, or at a size."""
    for size in settings.size_list:
        host.latent_shape(size)
    denoise = host.denoiser
    if settings.token_norm == "on" and not isinstance(denoise.schedule, FlowSchedule):
        raise OneStepError(
            f"token_norm is for models that predict a velocity, which {host.name} is not: set it to host"
        )
    if settings.token_norm == "on" and denoise.guidance != "cfg":
        raise OneStepError(
            f"token_norm is of classifier-free guidance, by which {host.name} is not drawn: set it to host"
        )
    noisiest = torch.tensor(denoise.schedule.sigma_max, dtype=torch.float64)
    if isinstance(denoise, EpsDenoiser) and float(denoise.schedule.alpha(noisiest)) == 0:
        raise OneStepError(
            f"{host.name} predicts noise and starts from pure noise (zero-terminal SNR), which cannot be: "
            "correct its prediction type, v-prediction most likely"
        )
    broken = [name for name, target in denoise.roles.targets.items() if not _is_finite(target.module)]
    if broken:
        raise OneStepError(
            f"{host.name} is damaged: {len(broken)} of its layers hold numbers that are not finite (NaN or infinite), "
            f"{broken[0][:80]} the first. Download or export it again"
        )


def _is_finite(layer: torch.nn.Module) -> bool:
    """Of a layer's plain weight; what is quantised or not in memory is not looked at."""
    weight: Any = getattr(layer, "weight", None)
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter) and not weight.is_meta and weight.dtype in PLAIN
    return not plain or bool(weight.isfinite().all())


def base_note(host: Host, settings: Settings) -> str:
    """What a run says of a base that is distilled already, and what to do with it; "" of any other."""
    name, kind = host.name[:80], few_step_kind_of(host)
    if kind:
        keep = "" if settings.guidance == 1 else "; to go on with it as the teacher, set guidance=1"
        return (
            f"{name} draws in few steps already ({kind[0]}, by {kind[1]}): a better teacher is the base that it was "
            f"made from, with this one's difference as initial_lora (Extract Few-Step LoRA){keep}"
        )
    if host.denoiser.guidance == "embedded":
        return f"{name} takes guidance as an input: teacher and student are given {settings.guidance:g}, in one forward"
    return ""


def few_step_kind_of(host: Host) -> tuple[str, str] | None:
    """(kind, evidence) of a base that is few-step already, as far as its file tells, or its network."""
    path = next((path for part, _, path in host.made_of if part == BASE), None)
    single = path is not None and path.suffix == ".safetensors" and path.is_file()
    header = read_header(path) if single and path else None
    found = few_step_kind(path or Path(host.name), header.metadata if header else {}, header.tensors if header else ())
    if found is None and host.denoiser.guidance == "none":
        return "distilled", "the guidance that it does not take"
    return found


def recipe_of(host: Host, settings: Settings) -> Recipe:
    """How the student will draw: as the initial LoRA does, where there is one that says so."""
    donor = student_of_donor(host, settings)
    if donor is not None:
        return donor
    schedule, steps = of_size(host.denoiser.schedule, host.latent_shape(settings.size_list[0])), settings.student_steps
    start = settings.start or automatic_start(schedule, steps)
    return Recipe.for_student(schedule, steps, host.family, settings.size_list, start)


def recipe_of_student(host: Host, settings: Settings) -> Recipe:
    """How the few-step student under an adapter is sampled, the initial LoRA or the base. Raises OneStepError for a
    LoRA of which nothing says so."""
    recipe = donor_recipe(host, settings)
    if recipe is None and settings.initial_lora and settings.initial_recipe == AUTO:
        raise OneStepError(
            "the initial LoRA does not say how it is sampled: name a preset in initial_recipe, or give one that "
            "onestep distill has made"
        )
    return recipe or recipe_of(host, settings)


def automatic_start(schedule: NoiseSchedule, steps: int) -> float:
    """The share of the model's time at which one step begins: where sigma / alpha = 2.5, as in SiD (arXiv:2404.04057),
    or next to it, where KSampler (Advanced) of ComfyUI begins a step.

    An eps-prediction's x0 has its error divided by alpha, which is 0.07 at Stable Diffusion's noisiest time and 0.37
    here. Schedules that end at alpha = 0 (flow, zero-terminal SNR) belong to networks that never divide by it: they
    begin at 1, and so do students of several steps, whose later steps mend the first.
    """
    noisiest = torch.tensor(schedule.sigma_max, dtype=torch.float64)
    if steps > 1 or isinstance(schedule, FlowSchedule) or float(schedule.alpha(noisiest)) < 1e-3:
        return 1.0
    level = schedule.sigma_of_log_snr(torch.tensor(-math.log(SIGMA_INIT)))
    time = float(schedule.time_of_sigma(level))
    if isinstance(schedule, VPSchedule):
        time = nearest_start(schedule, SIGMA_INIT)
    return time / float(schedule.time_of_sigma(noisiest))
