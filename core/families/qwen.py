"""Qwen-Image 1.x, 2512 among it: blocks of two streams under one attention, whose names are the same in both hosts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from ..schedule import FlowSchedule, SizeShift
from .family import NORM, SQUARE, Block, Config, Encoder, Family, Numbers
from .table import Row, count, repeated


def _same(*names: str) -> tuple[Row, ...]:
    return tuple(Row(name, (name,)) for name in names)


OUTSIDE = _same(
    *("img_in", "txt_in", "norm_out.linear", "proj_out"),
    *("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"),
)
BLOCK = _same(
    *("img_mod.1", "txt_mod.1", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
)

WIDTH = 3584
"""Of a text token, where a configuration does not say: ComfyUI knows this one alone."""

MEGAPIXEL = 64 * 64
"""Tokens of 1024 x 1024 pixels."""


def rows(blocks: int) -> Iterator[Row]:
    yield from OUTSIDE
    yield from repeated(BLOCK, "transformer_blocks", "transformer_blocks", blocks)


def layout_of(names: Iterable[str]) -> int:
    return count(list(names), "transformer_blocks")


def _widths(config: Config) -> tuple[int, int]:
    return config.get("joint_attention_dim", WIDTH), 0


QWEN_IMAGE = Family(
    title="the transformer of Qwen-Image",
    models="Qwen-Image",
    short="Qwen-Image",
    network="QwenImageTransformer2DModel",
    # ComfyUI's class has this very name; Mage-Flow's tree has the same children
    marks=(),
    keys=r"transformer_blocks[._]\d+[._](img|txt)_(mlp[._]net|mod[._]1)[._]",
    shared=r"transformer_blocks[._]\d+[._]attn[._](to_[qkv]|to_out|to_add_out|add_[qkv]_proj)([._]|$)"
    r"|time_text_embed[._]timestep_embedder",
    ratios=(SQUARE,),
    license="Qwen-Image: Apache-2.0",
    rows=rows,
    default=128,
    layout_of_canonical=layout_of,
    layout_of_comfy=layout_of,
    not_adapted=((r".*\.(norm_q|norm_k|norm_added_q|norm_added_k)|txt_norm", NORM),),
    architecture={None: "qwen-image/lora"},
    encoders={WIDTH: Encoder("Qwen-Image's Qwen2.5-VL-7B", "CLIPLoader with qwen_2.5_vl_7b, type qwen_image")},
    patch=2,
    even=True,
    packed=True,
    widths=_widths,
    pooled=False,
    lengths="masked",
    tokens=128,
    # ComfyUI's shift for every size, and diffusers' own by the size
    schedule=FlowSchedule(math.exp(1.15), by_steps=SizeShift(MEGAPIXEL, (256, 0.5), (8192, 0.9)), terminal=0.02),
    divided=1000,
    token_norm="token",
    scale="true_cfg_scale",
    placed=False,
    prompts="alone",
    pipelines=("QwenImagePipeline",),
    blocks={"QwenImageTransformerBlock": Block(("img_mlp", "txt_mlp"), picture=1)},
    ends=r"transformer_blocks\.\d+\.attn\.to_out\.0",
    entry="img_in",
    summary="txt_in",
    steering={
        "nasa": Numbers(0.25),
        "nag": Numbers(5.0),
        "vsf": Numbers(3.5),
        "perp": Numbers(10.0),
    },
)
