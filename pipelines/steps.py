"""The steps of a call, and what diffusers lets a caller do between them: callbacks, interrupt, another guidance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from ..core.cond import Cond
from ..core.denoiser import guided
from ..core.errors import OneStepError
from ..core.families import FAMILIES
from ..core.recipe import Recipe, recipe_of
from ..core.sampling import Draw, advance, initial_latents, levels_of
from .adapt import DiffusersHost
from .kinds import (
    ANIMA,
    CHROMA,
    FLUX,
    FLUX2,
    KLEIN,
    KREA2,
    LUMINA2,
    PIXART,
    QWEN_IMAGE,
    SD,
    SD3,
    SDXL,
    WAN,
    Z_IMAGE,
    pipeline_of,
)

Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]
NAMES = {
    SD: ["latents", "prompt_embeds", "negative_prompt_embeds"],
    SDXL: ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"],
    SD3: ["latents", "prompt_embeds", "pooled_prompt_embeds"],
    FLUX: ["latents", "prompt_embeds"],
    **dict.fromkeys(
        (Z_IMAGE, KLEIN, FLUX2, QWEN_IMAGE, ANIMA, KREA2, WAN, CHROMA, LUMINA2, PIXART), ["latents", "prompt_embeds"]
    ),
}
"""What callbacks may read and change, by the family's own pipeline."""

PARTS = {
    "prompt_embeds": "text",
    "pooled_prompt_embeds": "pooled",
    "add_text_embeds": "pooled",
    "add_time_ids": "size",
}


class StepState:
    """What a pipeline of diffusers says of its latest call, and what callbacks and other threads may change in it."""

    _guidance_scale = 1.0
    _num_timesteps = 0
    _interrupt = False

    @property
    def guidance_scale(self) -> float:
        """Callbacks change ``_guidance_scale``."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set ``_interrupt`` to end after the step that runs."""
        return self._interrupt

    @property
    def _callback_tensor_inputs(self: Any) -> list[str]:
        return NAMES[pipeline_of(self.components)]

    def begin(
        self: Any, recipe: Recipe | str | None, guidance_scale: float | None, steps: int | None
    ) -> tuple[Recipe, float | None]:
        """The recipe of a call that starts, and the guidance to embed where the model embeds one."""
        found = self.recipe if recipe is None else recipe_of(recipe)
        if steps is not None and steps != found.steps:
            raise OneStepError(
                f"num_inference_steps is {steps!r:.20}, and the recipe has {found.steps} steps: leave it out, or give "
                "a recipe of that many"
            )
        embedded = self.config.embedded_guidance
        if guidance_scale is not None:
            scale = _checked_scale(guidance_scale)
            # as diffusers has it: some embed it, and for all others what is not above 1 is none
            if FAMILIES[found.family].guidance:
                embedded = scale
            else:
                found = replace(found, guidance=max(scale, 1.0))
        self._guidance_scale = found.guidance if not FAMILIES[found.family].guidance or embedded is None else embedded
        self._num_timesteps, self._interrupt = found.steps, False
        return found, embedded


def _checked_scale(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise OneStepError(f"guidance_scale is {value!r:.40}: give a number from 0, of which 1 or less is none")
    return float(value)


class Called:
    """A caller's callback, which diffusers calls after each step. pipe: whose guidance it may change."""

    def __init__(self, pipe: Any, function: Callback | None, names: list[str] | None) -> None:
        if isinstance(function, PipelineCallback | MultiPipelineCallbacks):
            names = function.tensor_inputs
        self.pipe, self.function = pipe, function
        self.names = ["latents"] if names is None else list(names)
        known = pipe._callback_tensor_inputs
        strange = [name for name in self.names if name not in known]
        if strange:
            raise OneStepError(
                f"callback_on_step_end_tensor_inputs holds {strange[0]!r:.60}: choose from {', '.join(known)}"
            )

    def __call__(self, step: int, time: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        answer = self.function(self.pipe, step, time, dict(given)) if self.function is not None else given
        if not isinstance(answer, dict):
            raise OneStepError(f"callback_on_step_end returned {answer!r:.40}: let it return its dictionary of tensors")
        return answer


@dataclass
class Steps:
    """One call's way from noise to x0.

    cond, null: a row for each picture; null is None where nothing is guided. before: called before each step with the
    network's time there.
    halves: something acts on the prompt's half of each batch, so both halves stay when a callback turns guidance off.
    """

    host: DiffusersHost
    recipe: Recipe
    cond: Cond
    null: Cond | None
    callback: Called
    before: Callable[[float], None]
    halves: bool = False

    def __post_init__(self) -> None:
        self.scale = self.recipe.guidance
        if self.callback.function is not None and self.null is not None:
            # of one length, under one mask, so that a callback can be handed both as one tensor
            both = Cond.concat([self.null, self.cond])
            self.null, self.cond = both[: len(self.cond)], both[len(self.cond) :]

    def run(self, noise: Tensor, draw: Draw) -> Tensor:
        """x0 [B, C, h, w]; where interrupted, the latents as they were left."""
        schedule = self.host.denoiser.schedule
        levels = levels_of(schedule, self.recipe, len(noise))
        x = initial_latents(schedule, noise, levels[0], self.recipe.initial_noise_scale)
        for step, sigma in enumerate(levels):
            if self.callback.pipe.interrupt:
                break
            self.before(self.recipe.timesteps[step])
            x0 = guided(self.host.denoiser, x, sigma, self.cond, self.null, self._guidance(x))
            x = advance(schedule, self.recipe, step, levels, x, x0, draw)
            if self.callback.function is not None:
                x = self._called(step, x)
        return x

    def _guidance(self, x: Tensor) -> float | Tensor:
        """A tensor asks for both halves of the batch at 1 too."""
        turned_off = self.halves and self.null is not None and self.scale == 1
        return torch.ones(len(x), device=x.device) if turned_off else self.scale

    def _called(self, step: int, x: Tensor) -> Tensor:
        """The latents after the callback, whose other changes are kept here."""
        time = torch.tensor(self.recipe.timesteps[step], device=x.device)
        given = {name: x if name == "latents" else self._values(name) for name in self.callback.names}
        answer = self.callback(step, time, given)
        self._rescale(self.callback.pipe.guidance_scale)
        for name, value in answer.items():
            if name != "latents" and value is not given.get(name):
                self._replace(name, value)
        latents = answer.get("latents", x)
        if latents.shape != x.shape:
            raise OneStepError(f"a callback made latents {list(latents.shape)} of {list(x.shape)}: keep the shape")
        return latents.to(x)

    def _rescale(self, scale: float) -> None:
        """Callbacks written for diffusers turn guidance off by any scale of at most 1."""
        if self.host.kind in (FLUX, FLUX2) or scale == self.scale:
            return
        if self.null is None and scale > 1:
            raise OneStepError(
                f"a callback set guidance to {scale:g}, and this call began without: call with guidance_scale above 1"
            )
        self.scale = max(float(scale), 1.0)

    def _values(self, name: str) -> Tensor | None:
        """In diffusers' order: while guided, the negative's rows first."""
        if name == "negative_prompt_embeds":
            return None if self.null is None else self.null.text
        if self.null is None or self.scale == 1:
            value: Tensor = getattr(self.cond, PARTS[name])
            return value
        joined: Tensor = getattr(Cond.concat([self.null, self.cond]), PARTS[name])
        return joined

    def _replace(self, name: str, value: Any) -> None:
        """``value``, rows of the prompts or, before them, of the negatives too, in the conditions' place."""
        rows = len(self.cond)
        if name == "negative_prompt_embeds" and self.null is not None and len(value) == rows:
            self.null = self.null.with_(text=value)
            return
        if name not in PARTS or len(value) not in ((rows,) if self.null is None else (rows, 2 * rows)):
            raise OneStepError(
                f"a callback returned {name} with {len(value)} rows for {rows} pictures: return one row for each, and "
                "while guidance is on the negatives' rows before them"
            )
        self.cond = self.cond.with_(**{PARTS[name]: value[-rows:]})
        if self.null is not None and len(value) == 2 * rows:
            self.null = self.null.with_(**{PARTS[name]: value[:rows]})
