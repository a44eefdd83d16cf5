"""`tiny-flow`: a text-conditional MMDiT in the StableDiffusion3Pipeline layout without T5, and what it learns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .data import Prompts
from .teacher import Loss
from .unet import text_config

# Without T5 the pipeline appends this many zero tokens by default, ComfyUI appends none.
ZERO_TOKENS = 256
HALF = torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether this CPU multiplies in bfloat16; where it does not, such products take eight times as long as float32's."""


@dataclass(frozen=True)
class Shape:
    """heads of 64 channels; text_widths of the two encoders; joint: width the text is padded to with zeros."""

    layers: int = 3  # as many as heads: ComfyUI reads an SD3 model's depth off its width
    heads: int = 3
    text_widths: tuple[int, int] = (128, 64)
    joint: int = 256
    shift: float = 3.0


class ZeroTokenAttention:
    """SD3's joint attention, with the last text token standing for n equal ones.

    Zero tokens have no position, so n of them stay equal through every layer: n equal keys are one key whose logit is
    raised by log n. That costs one token in place of 256. `log_count` [B]; -inf takes the token away.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, log_count: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        image, text = hidden_states, encoder_hidden_states
        of_image = _heads(attn, image, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        of_text = _heads(attn, text, added, (attn.norm_added_q, attn.norm_added_k))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(of_image, of_text, strict=True))
        bias = torch.zeros(len(image), 1, 1, k.shape[2], dtype=q.dtype)
        bias[:, 0, 0, -1] = log_count
        out = nn.functional.scaled_dot_product_attention(q, k, v.to(q.dtype), bias).transpose(1, 2).flatten(2)
        image_out, text_out = out[:, : image.shape[1]], out[:, image.shape[1] :]
        return attn.to_out[0](image_out), text_out if attn.context_pre_only else attn.to_add_out(text_out)


def _heads(attn: Any, x: Tensor, layers: tuple[Any, ...], norms: tuple[Any, Any]) -> tuple[Tensor, ...]:
    """Normalised queries and keys, and values, [B, heads, L, D] of tokens [B, L, heads D]."""
    q, k, v = (layer(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in layers)
    return norms[0](q), norms[1](k), v


@contextmanager
def zero_tokens_as_one(transformer: nn.Module) -> Iterator[nn.Module]:
    """Within, the transformer attends by ZeroTokenAttention; afterwards as before."""
    usual = dict(transformer.attn_processors)
    transformer.set_attn_processor({name: ZeroTokenAttention() for name in usual})
    try:
        yield transformer
    finally:
        transformer.set_attn_processor(usual)


def build(shape: Shape, tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """Fresh "text", "text_2" and "transformer"."""
    first, second = shape.text_widths
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=shape.layers,
        attention_head_dim=64,
        num_attention_heads=shape.heads,
        joint_attention_dim=shape.joint,
        caption_projection_dim=64 * shape.heads,
        pooled_projection_dim=first + second,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )
    # adaLN-zero, as in DiT: every block starts as the identity.
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and (".norm1" in name or "norm_out" in name or name == "proj_out"):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.ModuleDict(
        {
            "text": CLIPTextModelWithProjection(text_config(tokenizer, first)),
            "text_2": CLIPTextModelWithProjection(text_config(tokenizer, second, heads=2)),
            "transformer": transformer,
        }
    )


def condition(modules: nn.ModuleDict, ids: Tensor, joint: int) -> tuple[Tensor, Tensor]:
    """What the pipeline makes of token ids [B, L]: text [B, L, joint] (last but one states) and pooled [B, P]."""
    outs = [modules[name](ids, output_hidden_states=True) for name in ("text", "text_2")]
    text = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
    pooled = torch.cat([out.text_embeds for out in outs], dim=-1)
    return nn.functional.pad(text, (0, joint - text.shape[-1])), pooled


def loss(modules: nn.ModuleDict, prompts: Prompts, shape: Shape) -> Loss:
    """The velocity noise - x0 at a time of logit-normal law."""

    def of_batch(x0: Tensor, noise: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
        batch, t = len(x0), logit_normal(len(x0), generator)
        x = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        half = torch.autocast("cpu", torch.bfloat16, enabled=HALF)
        with half, zero_tokens_as_one(modules["transformer"]) as transformer:
            text, pooled = condition(modules, prompts.draw(rows, generator), shape.joint)
            text = torch.cat([text, torch.zeros_like(text[:, :1])], dim=1)
            # Half the rows see the pipeline's zero tokens, half none: both hosts' conditioning is what was trained.
            log_count = torch.where(torch.arange(batch) % 2 == 0, math.log(ZERO_TOKENS), -1e4)
            out = transformer(x, text, pooled, 1000.0 * t, joint_attention_kwargs={"log_count": log_count})
        return nn.functional.mse_loss(out.sample.float(), noise - x0)

    return of_batch


def logit_normal(batch: int, generator: torch.Generator) -> Tensor:
    """Times [B], one in each equal share of the law (Esser et al. 2024, SD3, section 3.1), here of scale 1.2 so that
    the ends are seen too."""
    share = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    return torch.sigmoid(1.2 * torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4)))


def pipeline(
    modules: nn.ModuleDict, vae: AutoencoderKL, tokenizer: CLIPTokenizer, shape: Shape
) -> StableDiffusion3Pipeline:
    """The networks as a diffusers pipeline."""
    return StableDiffusion3Pipeline(
        transformer=modules["transformer"],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shape.shift),
        vae=vae,
        text_encoder=modules["text"],
        tokenizer=tokenizer,
        text_encoder_2=modules["text_2"],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
