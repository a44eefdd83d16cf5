"""Why a network of a class that is served is not served after all, in words; None where it is."""

from __future__ import annotations

from typing import Any


def why_not_sd3(network: Any) -> str | None:
    if network.context_processor or network.register_length:
        return "its text tokens see each other"
    return "it scales without a shift" if network.joint_blocks[0].context_block.scale_mod_only else None


def why_not_flux(network: Any) -> str | None:
    numbered = network.params.txt_ids_dims or network.params.global_modulation
    return "its text tokens have positions" if numbered else None


def why_not_flux2(network: Any) -> str | None:
    return None if network.params.global_modulation and network.params.txt_ids_dims else "its blocks modulate apart"


def why_not_qwen(network: Any) -> str | None:
    return "it draws layers" if network.time_text_embed.use_additional_t_cond else None


def why_not_pixart(network: Any) -> str | None:
    return "it is PixArt-Alpha" if network.micro_conditioning else None


def why_not_stream(family: str, network: Any) -> str | None:
    """Of Z-Image, which fills its texts up, and of Lumina 2, which does not."""
    if network.siglip_embedder is not None:
        return "it reads pictures too"
    if network.clip_text_pooled_proj is not None:
        return "it is modulated by a pooled text"
    if family == "z_image":
        return None if network.pad_tokens_multiple else "it does not fill its texts up"
    return "it fills its texts up" if network.pad_tokens_multiple else None
