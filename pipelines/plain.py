"""How diffusers alone, without any class of ours, draws what a recipe draws: which scheduler, set how, called how."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers

from ..core.errors import OneStepError
from ..core.families import FAMILIES
from ..core.recipe import Recipe
from ..core.schedule import VPSchedule
from .modular import is_modular

TRAINING_TIMES = 1000  # of every VP model that diffusers' schedulers are published for
# Whatever the base's own scheduler did: sigma noise at the timesteps themselves, down to 0.
EULER: dict[str, Any] = {
    "timestep_spacing": "trailing",
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
WITHOUT_T5 = "max_sequence_length=256 if pipe.text_encoder_3 else 0"
"""What to call an SD3 pipeline with that may lack T5, where diffusers puts zeros; 256 is its own default."""
EITHER_GUIDANCE = "guidance_scale={1!r} if pipe.transformer.config.guidance_embeds else {0!r}"
"""FLUX.2's: what dev embeds, and klein's classifier-free guidance."""

OWN_TOKENS = (
    "given = lambda name, text: {f'{name}_embeds': (own := pipe.text_encoder(pipe.tokenizer(text, "
    "return_tensors='pt').input_ids)[0]), f'{name}_attention_mask': torch.ones(own.shape[:2], dtype=torch.bool)}"
)
"""A text for a pipeline that would show its network padding too: its own tokens, under a mask of booleans."""
GUIDER = "pipe.guider = type(pipe.guider).from_config(pipe.guider.config, guidance_scale={!r})"
"""Of a pipeline that is put together of blocks, of which guidance is one."""
GIVEN_SIGMAS = (
    "pipe.scheduler.set_timesteps = lambda steps, device, own=pipe.scheduler.set_timesteps: own(steps, device, {!r})"
)
"""Of a pipeline whose call takes none, and asks its scheduler for so many steps."""


@dataclass(frozen=True)
class DiffusersSettings:
    """scheduler: the class, made from the pipeline's own scheduler's configuration with ``changes``.

    call: arguments of the pipeline's call. latents_scale: factor on standard normal latents, which are then to be given
    to the call; 1 where it draws its own. family: the recipe's. embedded: what a network is told that embeds its
    guidance, in a family whose others are guided classifier-free; None elsewhere.
    """

    scheduler: str
    changes: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    latents_scale: float = 1.0
    family: str = "unet"
    embedded: float | None = None

    @property
    def modular(self) -> bool:
        """Whether the family's own pipeline is put together of blocks."""
        return is_modular(getattr(diffusers, FAMILIES[self.family].pipelines[0]))

    @property
    def _takes(self) -> Mapping[str, inspect.Parameter]:
        """What the call of the family's own pipeline takes."""
        return inspect.signature(getattr(diffusers, FAMILIES[self.family].pipelines[0]).__call__).parameters

    def _usual(self, side: str) -> int | None:
        """Pixels along a ``side`` that the pipeline draws where its call says none; None where its parts tell."""
        return self._takes[side].default if side in self._takes else None

    @property
    def of_video(self) -> bool:
        """Whether the family's own pipeline draws videos, of which a picture is one frame."""
        return "num_frames" in self._takes

    @property
    def by_scheduler(self) -> list[float] | None:
        """The sigmas, where the call takes none and the scheduler must be given them."""
        return None if self.modular or "sigmas" in self._takes else self.call.get("sigmas")

    @property
    def words(self) -> dict[str, Any]:
        """Arguments of the call that hang on nothing of a loaded pipeline."""
        call = {name: value for name, value in self.call.items() if name != "sigmas" or not self.by_scheduler}
        return call | ({"num_frames": 1, "output_type": "pil"} if self.of_video else {})

    def apply(self, pipe: Any) -> dict[str, Any]:
        """Give ``pipe`` the scheduler; returns the arguments to call it with."""
        pipe.scheduler = getattr(diffusers, self.scheduler).from_config(pipe.scheduler.config, **self.changes)
        call = self._call(pipe)
        if self.by_scheduler:
            pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas=self.by_scheduler)
        if is_modular(type(pipe)):  # whose guidance is a part of it
            pipe.guider = type(pipe.guider).from_config(pipe.guider.config, guidance_scale=call.pop("guidance_scale"))
            call["output"] = "images"
        return call

    def script(self, pipe: Any, model: str, file: str, prompt: str, lora_scale: float = 1.0) -> str:
        """At most ten lines of Python for ``pipe``'s class that draw seed 0; what to print for a person."""
        if is_modular(type(pipe)):
            return self._modular_script(pipe, model, file, prompt, lora_scale)
        name, without_t5, path = type(pipe).__name__, _without_t5(pipe), Path(file)
        more = ", text_encoder_3=None, tokenizer_3=None" if without_t5 else ""
        changes = "".join(f", {key}={value!r}" for key, value in self.changes.items())
        call = "".join(f", {key}={value!r}" for key, value in self._call(pipe).items())
        lines = [
            "import torch",
            f"from diffusers import {name}, {self.scheduler}",
            f"pipe = {name}.from_pretrained({model!r}{more})",
            f"pipe.load_lora_weights({str(path.parent)!r}, weight_name={path.name!r})",
            f"pipe.scheduler = {self.scheduler}.from_config(pipe.scheduler.config{changes})",
            *([GIVEN_SIGMAS.format(self.by_scheduler)] if self.by_scheduler else []),
            "torch.manual_seed(0)",
        ]
        if lora_scale != 1:
            lines.insert(4, f"pipe.fuse_lora(lora_scale={lora_scale!r})")
        if self.latents_scale != 1:
            lines.append(self.noise_line())
            call += f", latents={self.latents_scale!r} * noise"
        lines += [OWN_TOKENS] if FAMILIES[self.family].longest else []
        picture = "frames[0][0]" if self.of_video else "images[0]"
        return "\n".join([*lines, f'pipe({self.prompt(repr(prompt))}{call}).{picture}.save("picture.png")'])

    def prompt(self, words: str) -> str:
        """How a call is given a prompt of these words, an expression of Python: where `given` makes the text of its own
        tokens, and of an empty negative's where guidance is on."""
        if not FAMILIES[self.family].longest:
            return f"prompt={words}"
        negative = ", **given('negative_prompt', '')" if self.call.get("guidance_scale", 1) > 1 else ""
        return f"**given('prompt', {words}){negative}"

    def _modular_script(self, pipe: Any, model: str, file: str, prompt: str, lora_scale: float) -> str:
        """The same of a pipeline that is put together of blocks, and has its guidance as a part."""
        name, path, call = type(pipe).__name__, Path(file), dict(self.call)
        guidance = call.pop("guidance_scale")
        changes = "".join(f", {key}={value!r}" for key, value in self.changes.items())
        lines = [
            f"import torch; from diffusers import {name}, {self.scheduler}",
            f"pipe = {name}.from_pretrained({model!r}); pipe.load_components()",
            f"pipe.load_lora_weights({str(path.parent)!r}, weight_name={path.name!r})",
            *([f"pipe.fuse_lora(lora_scale={lora_scale!r})"] if lora_scale != 1 else []),
            f"pipe.scheduler = {self.scheduler}.from_config(pipe.scheduler.config{changes})",
            GUIDER.format(guidance),
            "torch.manual_seed(0)",
            *([self.noise_line()] if self.latents_scale != 1 else []),
        ]
        more = "".join(f", {key}={value!r}" for key, value in call.items())
        more += f", latents={self.latents_scale!r} * noise" if self.latents_scale != 1 else ""
        return "\n".join([*lines, f'pipe(prompt={prompt!r}{more}, output="images")[0].save("picture.png")'])

    def noise_line(self) -> str:
        """Python that draws standard normal ``noise`` in the shape that a loaded ``pipe`` takes as latents."""
        known = FAMILIES[self.family]
        network, packed = known.part, known.packed
        channels = f"pipe.{network}.config.in_channels{' // 4' if packed else ''}"
        native = f"pipe.{network}.config.sample_size" if known.unet else "pipe.default_sample_size"
        usual = {side: self._usual(side) or f"{native} * pipe.vae_scale_factor" for side in ("height", "width")}
        height, width = (self.call.get(side, usual[side]) for side in usual)
        if self.modular or self.of_video:
            factor = "pipe.vae_scale_factor" + "_spatial" * self.of_video
            return f"noise = torch.randn(1, {channels}, 1, {height} // {factor}, {width} // {factor})"
        shape = f"1, {channels}, {height}, {width}, pipe.dtype, pipe.device, None"
        if known.folded > 1:
            return f"noise = pipe._unpack_latents_with_ids(*pipe.prepare_latents({shape}))"
        return f"noise = pipe.prepare_latents({shape}){'[0]' if packed and known.placed else ''}"

    def _call(self, pipe: Any) -> dict[str, Any]:
        """diffusers puts zeros where SD3 has no T5, and for SDXL's empty negative prompt, if not told otherwise."""
        call = self.words
        if _without_t5(pipe):
            call["max_sequence_length"] = 0
        if self.embedded is not None and pipe.transformer.config.guidance_embeds:
            call["guidance_scale"] = self.embedded
        if call.get("true_cfg_scale", 1) != 1:
            call["negative_prompt"] = ""  # without one that pipeline guides nothing
        if call.get("guidance_scale", 1) != 1 and pipe.config.get("force_zeros_for_empty_prompt"):
            call["negative_prompt"] = ""
        return call


def _without_t5(pipe: Any) -> bool:
    return "text_encoder_3" in pipe.components and pipe.text_encoder_3 is None


def diffusers_settings(recipe: Recipe, embedded_guidance: float | None = None) -> DiffusersSettings:
    """The settings that reproduce ``recipe``. Raises OneStepError, with the reason, where no scheduler can.

    embedded_guidance: what Flux-dev is told; the pipeline's own default where it is None.
    """
    if recipe.time_scale != 1:
        raise OneStepError(
            f"no scheduler of diffusers gives the network {recipe.time_scale:g} of each time: draw with OneStepPipeline"
        )
    if not hasattr(getattr(diffusers, FAMILIES[recipe.family].pipelines[0]), "load_lora_weights"):
        raise OneStepError(
            f"diffusers has no loader of LoRAs for {FAMILIES[recipe.family].models}: draw with OneStepPipeline, which "
            "puts the file on the network by peft"
        )
    of_indices = isinstance(FAMILIES[recipe.family].schedule, VPSchedule)
    settings = _vp(recipe.whole()) if of_indices else _flow(recipe.whole(), embedded_guidance)
    size = dict(zip(("width", "height"), recipe.sizes[0], strict=True)) if recipe.sizes else {}
    return replace(settings, call={**settings.call, **size}, family=recipe.family)


def _vp(recipe: Recipe) -> DiffusersSettings:
    """Euler where it begins as ComfyUI's samplers do; else LCMScheduler for one step or fresh noise, DDIM for none, TCD
    between, which all begin with unit noise."""
    times = [round(time) for time in recipe.timesteps]
    changes = {"clip_sample": False} | ({"prediction_type": recipe.prediction} if recipe.prediction else {})
    call: dict[str, Any] = {"num_inference_steps": recipe.steps, "guidance_scale": recipe.guidance}
    scale = recipe.initial_noise_scale
    if recipe.steps == 1 and scale != 1 and recipe.sigmas and _is_of_sigma(scale, recipe.sigmas[0]):
        return DiffusersSettings("EulerDiscreteScheduler", changes | EULER, call | {"timesteps": times})
    if recipe.steps == 1 or recipe.renoise or recipe.eta == 1:
        return DiffusersSettings("LCMScheduler", changes, call | {"timesteps": times}, scale)
    if recipe.eta > 0:
        return DiffusersSettings("TCDScheduler", changes, call | {"timesteps": times, "eta": recipe.eta}, scale)
    trailing = [round(TRAINING_TIMES * left / recipe.steps) - 1 for left in range(recipe.steps, 0, -1)]
    # DDIMScheduler steps down by a whole 1000 // steps, past the times themselves where that leaves a rest
    if times != trailing or TRAINING_TIMES % recipe.steps:
        raise OneStepError(
            f"no scheduler of diffusers goes the times {times} without fresh noise: draw with OneStepPipeline"
        )
    changes |= {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    return DiffusersSettings("DDIMScheduler", changes, call, scale)


def _is_of_sigma(scale: float, sigma: float | None) -> bool:
    """Whether ``scale`` is that of sigma noise at ``sigma`` (= sigma / alpha)."""
    return sigma is not None and math.isclose(scale, sigma / math.sqrt(1 + sigma**2), rel_tol=1e-6)


def _flow(recipe: Recipe, embedded_guidance: float | None) -> DiffusersSettings:
    """FlowMatchEulerDiscreteScheduler over the recipe's levels themselves, which are shifted already."""
    if 0 < recipe.eta < 1:
        raise OneStepError(f"no flow scheduler of diffusers has eta {recipe.eta:g}: draw with OneStepPipeline")
    stochastic = recipe.steps > 1 and (recipe.renoise or recipe.eta == 1)
    changes = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None, "stochastic_sampling": stochastic}
    call: dict[str, Any] = {"num_inference_steps": recipe.steps, "sigmas": [time / 1000 for time in recipe.timesteps]}
    # where guidance is embedded the argument of this name is that, which is no part of a recipe
    known = FAMILIES[recipe.family]
    either = bool(known.guidance) and known.unembedded == "cfg"
    guidance = embedded_guidance if known.guidance and not either else recipe.guidance
    # Z-Image's own pipeline counts from 0: D_c + g (D_c - D_u)
    call |= {} if guidance is None else {known.scale: guidance - 1 + known.unguided}
    told = (known.usual_guidance if embedded_guidance is None else embedded_guidance) if either else None
    first = recipe.timesteps[0] / 1000
    scale = recipe.initial_noise_scale * math.hypot(1 - first, first)
    return DiffusersSettings("FlowMatchEulerDiscreteScheduler", changes, call, scale, embedded=told)
