"""`One-Step Sample`, and its parts for SamplerCustomAdvanced: `One-Step Sampler` and `One-Step Sigmas`."""

from __future__ import annotations

import math
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from ..core.errors import OneStepError
from ..core.recipe import Recipe
from .denoiser import schedule_of
from .load_lora import RecipeSocket
from .sampler import RecipeSampler, comfy_sigmas

END = "onestep_end"
"""In a LATENT: the network's time at which its noise was left for another expert."""


class OneStepSample(io.ComfyNode):  # type: ignore[misc]
    """Draw by a recipe: its steps, its levels, its noise between them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepSample",
            display_name="One-Step Sample",
            category="OneStep/sampling",
            description="Draws in the one, two or four steps that the recipe names. The same seed gives "
            "KSampler's noise.",
            search_aliases=["few step", "turbo", "ksampler"],
            inputs=[
                io.Model.Input("model", tooltip="From Load One-Step LoRA."),
                io.Conditioning.Input("positive", tooltip="What to draw."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="Its size; a picture in it is noised to the recipe's first level and drawn anew. What "
                    "One-Step Sample has left of one expert (Wan 2.2's high-noise one) another goes on with.",
                ),
                RecipeSocket.Input("recipe", tooltip="From Load One-Step LoRA."),
                seed_input(),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Needed only where the recipe has a guidance other than 1."
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The picture's latents, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls, model: Any, positive: Any, latent_image: Any, recipe: Recipe, seed: int, negative: Any = None
    ) -> io.NodeOutput:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_cfg(recipe.guidance)
        if recipe.guidance == 1:
            guider.inner_set_conds({"positive": positive})
        elif negative is not None:
            guider.set_conds(positive, negative)
        else:
            raise OneStepError(
                f"the recipe has guidance {recipe.guidance:g}: plug a negative condition into One-Step Sample"
            )
        return io.NodeOutput(drawn(guider, model, latent_image, recipe, seed))


def drawn(guider: Any, model: Any, latent: dict[str, Any], recipe: Recipe, seed: int) -> dict[str, Any]:
    """The LATENT that ``guider`` draws from ``seed`` by ``recipe``, at the size of ``latent``."""
    start = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    )
    noise = comfy.sample.prepare_noise(start, seed, latent.get("batch_index"))
    sigmas = comfy_sigmas(schedule_of(model.get_model_object("model_sampling")), recipe)
    if goes_on(latent, recipe):
        noise = torch.zeros_like(noise)
    samples = guider.sample(
        noise,
        start,
        RecipeSampler(recipe),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        # one step has nothing on the way to preview
        callback=latent_preview.prepare_callback(model, recipe.steps) if recipe.steps > 1 else None,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    left = {END: recipe.end} if recipe.end else {}
    kept = {name: value for name, value in latent.items() if not name.startswith("downscale_ratio") and name != END}
    return {**kept, **left, "samples": samples.to(comfy.model_management.intermediate_device())}


def goes_on(latent: dict[str, Any], recipe: Recipe) -> bool:
    """Whether ``latent`` is what another expert's recipe has left, noise and all. Raises OneStepError where this one
    does not begin there."""
    left, first = latent.get(END), recipe.timesteps[0]
    if left is not None and not math.isclose(left, first, rel_tol=1e-5):
        raise OneStepError(
            f"the latents were left at time {left:g} for another expert to go on from, and this recipe begins at "
            f"{first:g}: load the two LoRAs of one pair, the high-noise one first"
        )
    return left is not None


def seed_input() -> Any:
    tooltip = "Of the noise; KSampler's is the same."
    return io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True, tooltip=tooltip)


class OneStepSampler(io.ComfyNode):  # type: ignore[misc]
    """The recipe's rules between its levels, as a SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepSampler",
            display_name="One-Step Sampler",
            category="OneStep/sampling",
            description="The recipe as a sampler for SamplerCustomAdvanced, with One-Step Sigmas and any guider.",
            search_aliases=["sampler", "few step", "turbo", "lcm"],
            inputs=[RecipeSocket.Input("recipe", tooltip="From Load One-Step LoRA.")],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced or SamplerCustom.")],
        )

    @classmethod
    def execute(cls, recipe: Recipe) -> io.NodeOutput:
        return io.NodeOutput(RecipeSampler(recipe))


class OneStepSigmas(io.ComfyNode):  # type: ignore[misc]
    """The recipe's levels, as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepSigmas",
            display_name="One-Step Sigmas",
            category="OneStep/sampling",
            description="The noise levels at which the recipe's steps are taken, on this model's schedule.",
            search_aliases=["sigmas", "scheduler", "few step", "timesteps"],
            inputs=[
                io.Model.Input("model", tooltip="Whose schedule the levels are read from."),
                RecipeSocket.Input("recipe", tooltip="From Load One-Step LoRA."),
            ],
            outputs=[io.Sigmas.Output(tooltip="One level a step, and the closing 0.")],
        )

    @classmethod
    def execute(cls, model: Any, recipe: Recipe) -> io.NodeOutput:
        return io.NodeOutput(comfy_sigmas(schedule_of(model.get_model_object("model_sampling")), recipe))


NODES = [OneStepSample, OneStepSampler, OneStepSigmas]
