"""FLUX.2 klein (4B, 9B) and dev: Flux' blocks without biases, whose modulations all blocks share."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..schedule import FlowSchedule, StepsShift
from .family import NORM, SQUARE, Block, Config, Encoder, Family, Numbers, first
from .flux import Layout, layout_of_canonical, layout_of_comfy
from .table import QKV, Row, repeated

OUTSIDE = (
    Row("img_in", ("x_embedder",)),
    Row("txt_in", ("context_embedder",)),
    Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
    Row("final_layer.linear", ("proj_out",)),
)

# linear_in holds a gate's rows, then the gated ones, in both hosts.
DOUBLE = (
    Row("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), widths=QKV),
    Row("img_attn.proj", ("attn.to_out.0",)),
    Row("img_mlp.0", ("ff.linear_in",)),
    Row("img_mlp.2", ("ff.linear_out",)),
    Row("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), widths=QKV),
    Row("txt_attn.proj", ("attn.to_add_out",)),
    Row("txt_mlp.0", ("ff_context.linear_in",)),
    Row("txt_mlp.2", ("ff_context.linear_out",)),
)

# Each is one layer in both hosts.
SINGLE = (
    Row("linear1", ("attn.to_qkv_mlp_proj",)),
    Row("linear2", ("attn.to_out",)),
)

UNREACHED = "no key of a file that diffusers reads finds it in ComfyUI's LoRA loader"
NOT_ADAPTED = (
    (r".*\.(query_norm|key_norm|norm_q|norm_k|norm_added_q|norm_added_k)", NORM),
    (r"(time|guidance)_in\.(in|out)_layer", UNREACHED),
    (r"time_guidance_embed\.(timestep|guidance)_embedder\.linear_[12]", UNREACHED),
    (r"(double_stream_modulation_(img|txt)|single_stream_modulation)\.lin(ear)?", UNREACHED),
)

MEGAPIXEL = 64 * 64
"""Tokens of 1024 x 1024 pixels."""


def rows(layout: Layout) -> Iterator[Row]:
    yield from OUTSIDE
    yield from repeated(DOUBLE, "double_blocks", "transformer_blocks", layout.double)
    yield from repeated(SINGLE, "single_blocks", "single_transformer_blocks", layout.single)


def _widths(config: Config) -> tuple[int, int]:
    return first(config, "joint_attention_dim", "context_in_dim"), 0


FLUX2 = Family(
    title="the transformer of FLUX.2",
    models="FLUX.2",
    short="FLUX.2",
    network="Flux2Transformer2DModel",
    marks=("double_blocks", "single_blocks", "img_in", "double_stream_modulation_img"),
    keys=r"to_qkv_mlp_proj|single_transformer_blocks[._]\d+[._]attn[._]to_out(\.lora|\.alpha|$)"
    r"|transformer_blocks[._]\d+[._]ff(_context)?[._]linear_(in|out)|(double|single)_stream_modulation"
    r"|time_guidance_embed",
    shared=r"transformer_blocks[._]\d+[._]attn[._]|(double|single)_blocks[._]\d",
    ratios=(
        *(SQUARE, (r"(img|txt)_mlp[._]0", 6.0), (r"(img|txt)_mlp[._]2", 1 / 3)),
        *((r"linear1", 9.0), (r"linear2", 1 / 4)),
    ),
    license="FLUX.2 klein 4B: Apache-2.0; klein 9B and dev: FLUX non-commercial",
    rows=rows,
    default=Layout(),
    layout_of_canonical=layout_of_canonical,
    layout_of_comfy=layout_of_comfy,
    not_adapted=NOT_ADAPTED,
    width=lambda config: config.get("hidden_size"),
    architecture={None: "flux-2/lora"},
    encoders={
        7680: Encoder("FLUX.2 klein 4B's Qwen3-4B", "CLIPLoader, type flux2"),
        12288: Encoder("FLUX.2 klein 9B's Qwen3-8B", "CLIPLoader, type flux2"),
        15360: Encoder("FLUX.2 dev's Mistral", "CLIPLoader, type flux2"),
    },
    patch=1,
    packed=True,
    folded=2,
    widths=_widths,
    pooled=False,
    lengths="filled in front",
    tokens=512,
    schedule=FlowSchedule(math.exp(2.02), by_steps=StepsShift(MEGAPIXEL)),
    divided=1000,
    guidance=("guidance_embeds", "guidance_embed"),
    usual_guidance=4.0,
    unembedded="cfg",
    prompts="alone",
    pipelines=("Flux2KleinPipeline", "Flux2Pipeline"),
    second=lambda config: bool(config.get("guidance_embeds")),
    blocks={
        "Flux2TransformerBlock": Block(("ff", "ff_context"), picture=1),
        "Flux2SingleTransformerBlock": Block(("",), sequence="text first", patch=1),
        # ComfyUI adds to its stream in place after these norms have kept it for backward
        "DoubleStreamBlock": Block(("img_mlp", "txt_mlp"), ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")),
        "SingleStreamBlock": Block(("",), ("pre_norm",), sequence="text first", patch=1, own="mlp_act.gate_fn"),
    },
    entry="x_embedder",
    ends=r"transformer_blocks\.\d+\.attn\.to_out\.0|single_transformer_blocks\.\d+\.attn\.to_out",
    summary="context_embedder",
    numbered=3,
    steering={
        "nasa": Numbers(0.25),
        "nag": Numbers(5.0),
        "vsf": Numbers(3.5),
        "perp": Numbers(10.0),
    },
)
