"""`tiny-dit`: a text-conditional transformer of one stream in the ZImagePipeline layout, and what it learns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from .data import Prompts
from .flow import logit_normal
from .teacher import Loss

FILLED = 32
"""Text and picture are each filled up to a multiple of so many tokens."""
KIND = "2-1"  # diffusers' name of the layers that embed 2x2 latents of one frame


@dataclass(frozen=True)
class Shape:
    """width: a multiple of 96, for which both hosts build the feed-forward alike; heads: of its sum(axes) channels.

    axes: channels that turn with time, row and column. text_width: of the encoder, whose last layer is not read.
    """

    width: int = 192
    heads: int = 6
    axes: tuple[int, int, int] = (8, 12, 12)
    layers: int = 3
    refiners: int = 1
    text_width: int = 128
    text_layers: int = 3
    shift: float = 3.0


def build(shape: Shape, tokenizer: Qwen2Tokenizer) -> nn.ModuleDict:
    """Fresh "text" encoder and "transformer", whose blocks start as the identity, as adaLN-zero's do."""
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=shape.width,
        n_layers=shape.layers,
        n_refiner_layers=shape.refiners,
        n_heads=shape.heads,
        n_kv_heads=shape.heads,
        cap_feat_dim=shape.text_width,
        axes_dims=list(shape.axes),
        axes_lens=[1024, 64, 64],
    )
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and ("adaLN" in name or name == f"all_final_layer.{KIND}.linear"):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(token, std=0.02)
    return nn.ModuleDict({"text": Qwen3Model(text_config(tokenizer, shape)), "transformer": transformer})


def text_config(tokenizer: Qwen2Tokenizer, shape: Shape) -> Qwen3Config:
    """A small Qwen3 with heads 128 wide, as ComfyUI has them."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.text_width,
        intermediate_size=2 * shape.text_width,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )


def velocity(transformer: nn.Module, x: Tensor, t: Tensor, text: Tensor, real: Tensor) -> Tensor:
    """noise - x0 of x [B, 4, h, w] at times t [B] in (0, 1), h w / 4 at most `FILLED`; text [B, FILLED, C], `real`
    [B, FILLED] where a token is the prompt's.

    What fills the picture up is one token, many times at one position. Equal tokens stay equal through every block, and
    n equal keys are one key whose logit is raised by log n.
    """
    height, width = x.shape[2] // 2, x.shape[3] // 2
    picture = transformer.all_x_embedder[KIND](_patches(x))
    missing = FILLED - picture.shape[1]
    if missing:
        picture = torch.cat([picture, transformer.x_pad_token.expand(len(x), 1, -1)], dim=1)
    bias = x.new_zeros(1, 1, 1, picture.shape[1] + FILLED)
    bias[..., picture.shape[1] - 1] = math.log(max(missing, 1))
    turns = _turns(transformer, height, width, bool(missing))
    at_picture, at_text = turns[:, : picture.shape[1]], turns[:, picture.shape[1] :]

    embedded = transformer.t_embedder((1.0 - t) * transformer.t_scale)
    text = torch.where(real[..., None], transformer.cap_embedder(text), transformer.cap_pad_token)
    for block in transformer.noise_refiner:
        picture = block(picture, bias[..., : picture.shape[1]], at_picture, embedded)
    for block in transformer.context_refiner:
        text = block(text, None, at_text)
    stream = torch.cat([picture, text], dim=1)
    for block in transformer.layers:
        stream = block(stream, bias, turns, embedded)
    out = transformer.all_final_layer[KIND](stream[:, : height * width], embedded)
    # The network answers x0 - noise.
    return -out.view(len(x), height, width, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def _patches(x: Tensor) -> Tensor:
    """[B, C, 2 h, 2 w] -> [B, h w, 4 C], the channels varying fastest."""
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _turns(transformer: nn.Module, height: int, width: int, filled: bool) -> Tensor:
    """[1, L, sum(axes) / 2] complex: of the picture's tokens, after FILLED of text in time, then of the text's."""
    picture = torch.cartesian_prod(torch.tensor([FILLED + 1]), torch.arange(height), torch.arange(width))
    filling = torch.zeros(int(filled), 3, dtype=torch.long)
    text = torch.cartesian_prod(torch.arange(1, FILLED + 1), torch.zeros(1).long(), torch.zeros(1).long())
    return transformer.rope_embedder(torch.cat([picture, filling, text]).int())[None]  # type: ignore[no-any-return]


def condition(modules: nn.ModuleDict, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the pipeline makes of token ids [B, L], L at most FILLED: text [B, FILLED, C] (states of the last layer but
    one) and where it is the prompt's [B, FILLED]."""
    text = modules["text"]
    real = ids != text.config.pad_token_id
    states = text(ids, attention_mask=real, output_hidden_states=True).hidden_states[-2]
    more = FILLED - ids.shape[1]
    return nn.functional.pad(states, (0, 0, 0, more)), nn.functional.pad(real, (0, more))


def loss(modules: nn.ModuleDict, prompts: Prompts, shape: Shape) -> Loss:
    """The velocity noise - x0 at a time of logit-normal law."""

    def of_batch(x0: Tensor, noise: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
        t = logit_normal(len(x0), generator)
        x = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        found = velocity(modules["transformer"], x, t, *condition(modules, prompts.draw(rows, generator)))
        return nn.functional.mse_loss(found, noise - x0)

    return of_batch


def pipeline(modules: nn.ModuleDict, vae: AutoencoderKL, tokenizer: Qwen2Tokenizer, shape: Shape) -> ZImagePipeline:
    """The networks as a diffusers pipeline."""
    return ZImagePipeline(
        transformer=modules["transformer"],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shape.shift),
        vae=vae,
        text_encoder=modules["text"],
        tokenizer=tokenizer,
    )
