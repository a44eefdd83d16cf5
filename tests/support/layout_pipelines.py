"""diffusers' pipelines around `small_networks`: the published layouts, whole, with random weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import small_networks as small
import tiny_chroma
import tiny_krea2
import tiny_lumina2
import tiny_pipelines as tiny
import tiny_qwen
import torch
from diffusers import (
    AnimaModularPipeline,
    AnimaTextConditioner,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
    ZImagePipeline,
)
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from onestep.pipelines.encode import encode_text

SIDE = 16
"""Pixels; the tiny autoencoder halves them."""


def sd15() -> Any:
    return StableDiffusionPipeline(
        **{"vae": tiny.vae(), "unet": small.network_of("sd15", torch.float32), "scheduler": tiny.ddim()},
        **{"text_encoder": tiny.clip(width=24), "tokenizer": tiny.clip_tokenizer()},
        **{"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    )


def sdxl() -> Any:
    """Sizes embedded in 256 numbers each, as ComfyUI embeds them."""
    return StableDiffusionXLPipeline(
        **{"vae": tiny.vae(), "unet": small.network_of("sdxl", torch.float32, embedded=256), "scheduler": tiny.ddim()},
        **{"text_encoder": tiny.clip(width=8), "tokenizer": tiny.clip_tokenizer(), "add_watermarker": False},
        **{"text_encoder_2": tiny.clip(True, width=16), "tokenizer_2": tiny.clip_tokenizer()},
    )


def sd3() -> Any:
    return StableDiffusion3Pipeline(
        **{"vae": tiny.vae(16, shift_factor=0.06), "transformer": small.network_of("sd3", torch.float32)},
        **{"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "text_encoder_3": None, "tokenizer_3": None},
        **{"text_encoder": tiny.clip(True, width=8), "tokenizer": tiny.clip_tokenizer()},
        **{"text_encoder_2": tiny.clip(True, width=8), "tokenizer_2": tiny.clip_tokenizer()},
    )


def flux() -> Any:
    t5 = T5EncoderModel(T5Config(vocab_size=8, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    return FluxPipeline(
        **{"vae": tiny.vae(16, shift_factor=0.1), "transformer": small.network_of("flux", torch.float32)},
        **{"scheduler": FlowMatchEulerDiscreteScheduler(), "text_encoder_2": t5, "tokenizer_2": tiny.t5_tokenizer()},
        **{"text_encoder": tiny.clip(width=16), "tokenizer": tiny.clip_tokenizer()},
    )


def z_image() -> Any:
    encoder = Qwen3Config(
        **{"vocab_size": 10, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    )
    return ZImagePipeline(
        **{"vae": tiny.vae(16, shift_factor=0.1), "transformer": small.network_of("z_image", torch.float32)},
        **{"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "text_encoder": Qwen3Model(encoder)},
        tokenizer=tiny.qwen3_tokenizer(),
    )


def flux2() -> Any:
    """klein, whose network embeds no guidance."""
    return Flux2KleinPipeline(
        **{"vae": tiny.folded_vae(32), "transformer": small.network_of("flux2", torch.float32, guidance_embeds=False)},
        **{"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)},
        **{"text_encoder": tiny.klein_encoder(), "tokenizer": tiny.qwen3_tokenizer()},
    )


def anima() -> Any:
    """Latents of a video's one frame, an eighth of the side."""
    encoder = Qwen3Config(
        **{"vocab_size": 10, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    )
    sizes = {"source_dim": 24, "target_dim": 24, "model_dim": 24, "num_layers": 1, "num_attention_heads": 2}
    pipe = AnimaModularPipeline()
    pipe.update_components(
        **{"vae": tiny.video_vae(), "transformer": small.network_of("anima", torch.float32)},
        **{"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "text_encoder": Qwen3Model(encoder)},
        **{"text_conditioner": AnimaTextConditioner(**sizes, target_vocab_size=8)},
        **{"tokenizer": tiny.qwen3_tokenizer(), "t5_tokenizer": tiny.t5_tokenizer()},
    )
    return pipe


def qwen_image() -> Any:
    """Its text is 24 wide, in heads of 12."""
    pipe = tiny_qwen.qwen_image(tiny.video_vae(), 24, 2)
    pipe.register_modules(transformer=small.network_of("qwen_image", torch.float32))
    return pipe


def chroma() -> Any:
    """Drawn by Flux' shift, which ComfyUI's class has."""
    pipe = tiny_chroma.chroma(tiny.vae(16, shift_factor=0.1), 64, scheduler={"shift": math.exp(1.15)}, num_layers=1)
    pipe.register_modules(transformer=small.network_of("chroma", torch.float32, **small.WHOLE["chroma"]))
    return pipe


def lumina2() -> Any:
    """Its pipeline takes every VAE for one of an eighth of the side."""
    pipe = tiny_lumina2.lumina2(tiny.vae(16, levels=4, shift_factor=0.1), 24, 16)
    pipe.register_modules(transformer=small.network_of("lumina2", torch.float32))
    return pipe


def wan() -> Any:
    """Latents of a video's one frame, an eighth of the side."""
    text = UMT5Config(vocab_size=8, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_encoder_decoder=False)
    return WanPipeline(
        **{"vae": tiny.video_vae(AutoencoderKLWan), "transformer": small.network_of("wan", torch.float32)},
        **{"scheduler": FlowMatchEulerDiscreteScheduler(shift=8.0), "text_encoder": UMT5EncoderModel(text)},
        tokenizer=tiny.t5_tokenizer(),
    )


def krea2() -> Any:
    """Its text is three layers of 8, in heads of 16."""
    pipe = tiny_krea2.krea2(tiny.video_vae(), head=16, distilled=True)
    pipe.register_modules(transformer=small.network_of("krea2", torch.float32))
    return pipe


MAKERS: dict[str, Callable[[], Any]] = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux, "z_image": z_image}
MAKERS |= {"flux2": flux2, "anima": anima, "qwen_image": qwen_image, "wan": wan, "chroma": chroma, "lumina2": lumina2}
MAKERS["krea2"] = krea2


def make(name: str) -> Any:
    """The same weights every time."""
    torch.manual_seed(0)
    pipe = MAKERS[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def network(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def embedded(pipe: Any, prompt: str) -> dict[str, Tensor]:
    """text [1, L, C] and, where the layout reads one, pooled [1, C]: what its network is given for ``prompt``."""
    name = type(pipe).__name__
    if name == "StableDiffusionPipeline":
        return {"text": pipe.encode_prompt(prompt, "cpu", 1, False)[0]}
    if name == "ZImagePipeline":
        return {"text": pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0][0][None]}
    if name in ("AnimaModularPipeline", "WanPipeline", "Krea2Pipeline"):
        return {"text": encode_text(pipe, [prompt], device="cpu").text}
    if name in ("ChromaPipeline", "Lumina2Pipeline"):
        return {"text": encode_text(pipe, [prompt], device="cpu").text}
    if name in ("Flux2KleinPipeline", "QwenImagePipeline"):
        return {"text": pipe.encode_prompt(prompt)[0]}
    if name == "FluxPipeline":
        text, pooled, _ = pipe.encode_prompt(prompt, None)
        return {"text": text, "pooled": pooled}
    more: dict[str, Any] = {"prompt_2": None, "do_classifier_free_guidance": False}
    if name == "StableDiffusion3Pipeline":
        more |= {"prompt_3": None, "max_sequence_length": 0}
    text, _, pooled, _ = pipe.encode_prompt(prompt, **more)
    return {"text": text, "pooled": pooled}
