"""Flux.1: double blocks, in which text and picture are two streams that attend jointly, then single ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..schedule import FlowSchedule
from .family import NORM, SQUARE, Block, Config, Encoder, Family, Numbers, first
from .table import QKV, REST, Row, count, repeated

OUTSIDE = (
    Row("img_in", ("x_embedder",)),
    Row("txt_in", ("context_embedder",)),
    Row("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    Row("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    Row("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    Row("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    Row("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    Row("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
    Row("final_layer.linear", ("proj_out",)),
)

DOUBLE = (
    Row("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), widths=QKV),
    Row("img_attn.proj", ("attn.to_out.0",)),
    Row("img_mlp.0", ("ff.net.0.proj",)),
    Row("img_mlp.2", ("ff.net.2",)),
    Row("img_mod.lin", ("norm1.linear",)),
    Row("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), widths=QKV),
    Row("txt_attn.proj", ("attn.to_add_out",)),
    Row("txt_mlp.0", ("ff_context.net.0.proj",)),
    Row("txt_mlp.2", ("ff_context.net.2",)),
    Row("txt_mod.lin", ("norm1_context.linear",)),
)

SINGLE = (
    Row("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), widths=(*QKV, REST)),
    # Only in LoRA files: some trainers adapt q, k and v of linear1 without the MLP.
    Row("linear1_qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), widths=QKV),
    Row("linear2", ("proj_out",)),
    Row("modulation.lin", ("norm.linear",)),
)


@dataclass(frozen=True)
class Layout:
    """Numbers of double and of single blocks; by default more than any model has."""

    double: int = 64
    single: int = 64


def rows(layout: Layout) -> Iterator[Row]:
    yield from OUTSIDE
    yield from repeated(DOUBLE, "double_blocks", "transformer_blocks", layout.double)
    yield from repeated(SINGLE, "single_blocks", "single_transformer_blocks", layout.single)


def layout_of_canonical(names: Iterable[str]) -> Layout:
    names = list(names)
    return Layout(count(names, "transformer_blocks"), count(names, "single_transformer_blocks"))


def layout_of_comfy(names: Iterable[str]) -> Layout:
    names = list(names)
    return Layout(count(names, "double_blocks"), count(names, "single_blocks"))


def _widths(config: Config) -> tuple[int, int]:
    return first(config, "joint_attention_dim", "context_in_dim"), first(config, "pooled_projection_dim", "vec_in_dim")


FLUX = Family(
    title="the transformer of Flux",
    models="Flux",
    short="Flux",
    network="FluxTransformer2DModel",
    marks=("double_blocks", "single_blocks", "img_in", "vector_in"),
    keys=r"single_transformer_blocks[._]\d+[._]norm|(img|txt)_mod[._]lin|single_blocks[._]\d+[._]modulation",
    sisters=r"single_transformer_blocks[._]\d+[._](attn[._]to_[qkv]([._]|$)|proj_(mlp|out))",
    shared=r"transformer_blocks[._]\d+[._](attn[._]|norm1|ff[._]net|ff_context[._]net)|(double|single)_blocks[._]\d",
    ratios=(
        *(SQUARE, (r"(img|txt)_mlp[._]0", 4.0), (r"(img|txt)_mlp[._]2", 1 / 4)),
        *((r"linear1", 7.0), (r"linear2", 1 / 5)),
    ),
    license=(
        "FLUX.1-schnell: Apache-2.0; FLUX.1-dev: non-commercial, its outputs not "
        '"to train, fine-tune or distill a model that is competitive with" it, a LoRA shared under the same'
    ),
    rows=rows,
    default=Layout(),
    layout_of_canonical=layout_of_canonical,
    layout_of_comfy=layout_of_comfy,
    not_adapted=((r".*\.(query_norm|key_norm|norm_q|norm_k|norm_added_q|norm_added_k)", NORM),),
    width=lambda config: config.get("hidden_size"),
    architecture={None: "flux-1-dev/lora"},
    encoders={4096: Encoder("Flux' CLIP-L and T5-XXL", "DualCLIPLoader, type flux")},
    patch=2,
    packed=True,
    widths=_widths,
    pooled=True,
    lengths="equal",
    tokens=512,
    schedule=FlowSchedule(math.exp(1.15)),
    divided=1000,
    guidance=("guidance_embeds", "guidance_embed"),
    usual_guidance=3.5,
    pipelines=("FluxPipeline",),
    blocks={
        "FluxTransformerBlock": Block(("ff", "ff_context"), picture=1),
        "FluxSingleTransformerBlock": Block(("",), picture=1),
        # ComfyUI adds to its stream in place after these norms have kept it for backward
        "DoubleStreamBlock": Block(("img_mlp", "txt_mlp"), ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")),
        "SingleStreamBlock": Block(("",), ("pre_norm",), sequence="text first", own="modulation"),
    },
    entry="x_embedder",
    ends=r"transformer_blocks\.\d+\.attn\.to_out\.0|single_transformer_blocks\.\d+\.proj_out",
    summary="time_text_embed.text_embedder.linear_1",
    steering={
        "nasa": Numbers(0.25),
        "nag": Numbers(5.0, order=2),
        "vsf": Numbers(3.5, offset=0.0),
        "perp": Numbers(10.0),
    },
)
