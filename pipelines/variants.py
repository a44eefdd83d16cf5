"""Networks of a served class that are another kind of model."""

from __future__ import annotations

from typing import Any

from ..core.errors import OneStepError
from ..core.families import FAMILIES


def refuse_variant(family: str, network: Any, pooled_encoder: Any = None, vae: Any = None) -> None:
    """Networks of a known class that take more than noisy latents and a text.

    pooled_encoder: SDXL's second text encoder, whose width tells how many sizes the U-Net is told. vae: whose latents
    the network should take.
    """
    known, config = FAMILIES[family], network.config
    kind = "U-Net" if known.unet else "transformer"
    # Qwen-Image's configuration counts what leaves it unpacked
    answered = (config.get("out_channels") or config.in_channels) // (1 + known.variance)
    if answered not in (config.in_channels, known.channels(config)):
        raise OneStepError(
            f"this {kind} has {config.in_channels} input channels (inpainting, depth or upscaling): "
            "use a text-to-image base"
        )
    wanted = known.channels(config) / known.folded**2
    told = getattr(vae, "config", {})
    made = told.get("latent_channels", told.get("z_dim", wanted))  # z_dim of Wan's and Qwen-Image's
    if made != wanted:
        raise OneStepError(
            f"this {kind} takes latents of {wanted:g} channels, and the VAE's have {made}: use a text-to-image base, "
            "and its own VAE"
        )
    if not known.unet:
        return
    if config.time_cond_proj_dim is not None:
        raise OneStepError("this U-Net embeds its guidance (an LCM model): use the base it was made from, or its LoRA")
    if config.addition_embed_type == "text_time" and pooled_encoder is not None:
        told = config.projection_class_embeddings_input_dim - pooled_encoder.config.projection_dim
        if told != 6 * config.addition_time_embed_dim:
            raise OneStepError("this U-Net is not told SDXL's six sizes (it is a refiner?): use the SDXL base")
