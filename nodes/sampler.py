"""A recipe as ComfyUI's SAMPLER: our sampler over whatever guider, patches, masks and conditions are plugged in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy.k_diffusion.sampling as k_diffusion
import comfy.samplers
import torch
from torch import Tensor

from ..core.cond import Cond
from ..core.denoiser import Guidance, TokenNorm
from ..core.errors import OneStepError
from ..core.recipe import Recipe
from ..core.roles import Roles
from ..core.sampling import sample
from ..core.schedule import NoiseSchedule, add_noise, expand
from .denoiser import schedule_of, signal

NOTHING = Cond(torch.zeros(1, 1, 1))  # the guider holds the conditions


class RecipeSampler(comfy.samplers.Sampler):  # type: ignore[misc]
    """Draws at the levels of SIGMAS, by the recipe's rules between them."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """x0 in the model's own latent scale; the arguments are those of ComfyUI's KSAMPLER."""
        model_sampling = model_wrap.inner_model.model_sampling
        schedule = schedule_of(model_sampling)
        recipe = self._at(sigmas, schedule)
        masked = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        masked.latent_image, masked.noise = latent_image, noise
        told = {**extra_args, "denoise_mask": denoise_mask}
        denoise = _Guided(masked, schedule, Roles([]), "none", told, callback, recipe.steps)
        fresh = k_diffusion.default_noise_sampler(noise, seed=extra_args.get("seed"))
        start = started(schedule, recipe, noise, latent_image)
        x0 = sample(denoise, recipe, NOTHING, start, lambda step: fresh(None, None))
        return model_sampling.inverse_noise_scaling(sigmas[-1], x0)

    def _at(self, sigmas: Tensor, schedule: NoiseSchedule) -> Recipe:
        """The recipe at the levels of ``sigmas``; guidance is the guider's."""
        own = comfy_sigmas(schedule, self.recipe)
        if len(sigmas) < 2 or not math.isclose(float(sigmas[-1]), float(own[-1]), rel_tol=1e-5):
            raise OneStepError(
                f"the recipe's sampler draws down to sigma {float(own[-1]):g}, the sigmas given are "
                f"{sigmas.tolist()[:8]}: plug in all of them"
            )
        if own.shape == sigmas.shape and torch.allclose(own, sigmas.to(own), rtol=1e-5):
            return replace(self.recipe, guidance=1.0)
        times = schedule.time_of_sigma(contract_levels(schedule, sigmas[:-1]))
        scale = self.recipe.noise_scale_from(schedule, schedule.sigma_of_time(times[0]))
        return replace(self.recipe.retimed(tuple(times.tolist()), scale), guidance=1.0, end=self.recipe.end)


@dataclass
class _Guided:
    """ComfyUI's guider as the contract's denoiser; conditions and guidance are inside it."""

    model: Any
    schedule: NoiseSchedule
    roles: Roles
    guidance: Guidance
    told: dict[str, Any]
    callback: Callable[..., None] | None
    steps: int
    step: int = 0
    token_norm: TokenNorm = 0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        alpha = signal(self.schedule, sigma)
        outer = x / expand(alpha, x)
        x0 = self.model(outer, (sigma / alpha).to(x), **self.told)
        if self.callback is not None:
            self.callback(self.step, x0, outer, self.steps)
        self.step += 1
        return x0


def started(schedule: NoiseSchedule, recipe: Recipe, noise: Tensor, latent: Tensor | None) -> Tensor:
    """The noise that core's sampler starts from: as it is for an empty latent, else the picture's noisy version."""
    if latent is None or torch.count_nonzero(latent) == 0:
        return noise
    sigma = recipe.levels(schedule)[:1].expand(len(noise))
    unit = (schedule.alpha(sigma) ** 2 + sigma**2).sqrt()
    return add_noise(schedule, latent, noise, sigma) / expand(recipe.initial_noise_scale * unit, noise)


def contract_levels(schedule: NoiseSchedule, sigmas: Tensor) -> Tensor:
    """ComfyUI's sigmas as the contract's levels."""
    sigmas = sigmas.cpu().double()
    flow = schedule.sigma_max == 1 and schedule.sigma_min == 0
    return sigmas if flow else sigmas / (1 + sigmas**2).sqrt()


def comfy_sigmas(schedule: NoiseSchedule, recipe: Recipe) -> Tensor:
    """The recipe's levels as ComfyUI's SIGMAS, float32, with the closing 0, or the end where another goes on."""
    levels = recipe.levels(schedule)
    values = (levels / signal(schedule, levels)).tolist()
    if not all(map(math.isfinite, values)):
        raise OneStepError(
            f"the recipe's times {recipe.timesteps} have no finite level on this model: choose the recipe's own base"
        )
    return torch.tensor([*values, float(recipe.end_level(schedule)) if recipe.end else 0.0], dtype=torch.float32)
