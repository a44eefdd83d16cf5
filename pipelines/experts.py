"""Two experts of one model, as Wan 2.2's: one draws the first steps, down to its recipe's end, the other the rest."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..core.errors import OneStepError
from .one_step import OneStepPipeline


def draw_by_experts(high: OneStepPipeline, low: OneStepPipeline, prompt: Any = None, **call: Any) -> Any:
    """Pictures whose first steps ``high`` draws by its recipe, and the rest ``low`` by its own, which begins where that
    ends. call: as `OneStepPipeline` takes it, but for ``latents``, which are where ``high`` begins.

        high = OneStepPipeline.from_pipe(pipe)
        low = OneStepPipeline.from_pipe(pipe, transformer=pipe.transformer_2)
        high.load_one_step_lora("high_noise.safetensors")
        low.load_one_step_lora("low_noise.safetensors")
        pictures = draw_by_experts(high, low, "a lighthouse in a storm", seed=0).images

    Raises OneStepError where the one does not begin where the other ends.
    """
    first, second = high.recipe, low.recipe
    if not math.isclose(first.end, second.timesteps[0], rel_tol=1e-5):
        raise OneStepError(
            f"the first expert's recipe ends at time {first.end:g}, and the second's begins at "
            f"{second.timesteps[0]:g}: load the two LoRAs of one pair, the high-noise one first"
        )
    if (seed := call.pop("seed", None)) is not None:
        # one stream for both, as a sampler's noise goes on
        call["generator"] = torch.Generator().manual_seed(seed)
    shown = {name: call.pop(name) for name in ("output_type", "return_dict") if name in call}
    left = high(prompt, **call, output_type="latent").images
    schedule = low.host(second).denoiser.schedule
    sigma = second.levels(schedule)[0]
    begins = second.initial_noise_scale * float((schedule.alpha(sigma) ** 2 + sigma**2).sqrt())
    return low(prompt, **{**call, "latents": left / begins}, **shown)
