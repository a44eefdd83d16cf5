"""`Diversity Sigmas`: the base draws a picture's first part, a distilled model the rest; the levels of both."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ..core.diversity import base_part, remaining
from ..core.recipe import Recipe
from ..core.schedule import log_snr
from .denoiser import schedule_of, signal
from .load_lora import RecipeSocket
from .sampler import comfy_sigmas, contract_levels


class OneStepDiversitySigmas(io.ComfyNode):  # type: ignore[misc]
    """SIGMAS for two SamplerCustom nodes that draw one picture one after the other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepDiversitySigmas",
            display_name="Diversity Sigmas",
            category="OneStep/sampling",
            description="Splits a drawing: the base takes its first, composing part, the few-step model the rest. "
            "Give base_sigmas to a SamplerCustom with the base (add_noise on, its usual cfg) and distilled_sigmas to "
            "one with the few-step model (add_noise off, cfg 1, One-Step Sampler), which takes the first one's output.",
            search_aliases=["diversity", "variety", "two stage", "hybrid", "split sigmas", "base then turbo"],
            inputs=[
                io.Model.Input("base", tooltip="The model in its many steps, with its own LoRAs."),
                io.Model.Input("distilled", tooltip="From Load One-Step LoRA, over the same latents as the base."),
                RecipeSocket.Input("recipe", tooltip="From Load One-Step LoRA."),
                io.Int.Input(
                    "base_steps",
                    default=20,
                    min=1,
                    max=1000,
                    tooltip="Of the base's whole run; it takes only those above the hand-over. Fewer = faster.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(comfy.samplers.SCHEDULER_NAMES),
                    default="simple",
                    tooltip="Of the base's whole run, as in KSampler.",
                ),
                io.Float.Input(
                    "hand_over",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    round=False,
                    tooltip="Where the few-step model takes over, as a share of its time; 1 would be pure noise. 0 = "
                    "automatic: its second step. A one-step model needs a level that it was trained at.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(display_name="base_sigmas", tooltip="The base's levels, down to the hand-over."),
                io.Sigmas.Output(
                    display_name="distilled_sigmas",
                    tooltip="The few-step model's levels from there, and the closing 0.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, base: Any, distilled: Any, recipe: Recipe, base_steps: int, scheduler: str, hand_over: float
    ) -> io.NodeOutput:
        sampling = base.get_model_object("model_sampling")
        own = comfy.samplers.calculate_sigmas(sampling, scheduler, base_steps).cpu()
        few = schedule_of(distilled.get_model_object("model_sampling"))
        taken = comfy_sigmas(few, remaining(recipe, few, hand_over))
        return io.NodeOutput(
            base_sigmas(schedule_of(sampling), own, log_snr(few, contract_levels(few, taken[0]))), taken
        )


def base_sigmas(schedule: Any, own: Tensor, until: Tensor) -> Tensor:
    """Of ComfyUI's sigmas ``own`` [N + 1] those of the base's part, float32, ending at log-SNR ``until``."""
    kept = base_part(log_snr(schedule, contract_levels(schedule, own[:-1])), until)
    level = schedule.sigma_of_log_snr(until)
    return torch.cat([own[: len(kept) - 1].float(), (level / signal(schedule, level)).float().reshape(1)])


NODES = [OneStepDiversitySigmas]
