"""PixArt-Sigma: blocks of one stream that attend to the picture, then to a text, under one modulation for all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ..schedule import VPSchedule
from .family import Block, Config, Encoder, Family, Numbers
from .table import INPUT, QKV, Row, count, repeated

TIME = "adaln_single.emb.timestep_embedder"
OUTSIDE = (
    Row("x_embedder.proj", ("pos_embed.proj",)),
    Row("t_embedder.mlp.0", (f"{TIME}.linear_1",)),
    Row("t_embedder.mlp.2", (f"{TIME}.linear_2",)),
    Row("t_block.1", ("adaln_single.linear",)),
    Row("y_embedder.y_proj.fc1", ("caption_projection.linear_1",)),
    Row("y_embedder.y_proj.fc2", ("caption_projection.linear_2",)),
    Row("final_layer.linear", ("proj_out",)),
)
BLOCK = (
    Row("attn.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v"), widths=QKV),
    Row("attn.proj", ("attn1.to_out.0",)),
    Row("cross_attn.q_linear", ("attn2.to_q",)),
    Row("cross_attn.kv_linear", ("attn2.to_k", "attn2.to_v"), widths=(INPUT, INPUT)),
    Row("cross_attn.proj", ("attn2.to_out.0",)),
    Row("mlp.fc1", ("ff.net.0.proj",)),
    Row("mlp.fc2", ("ff.net.2",)),
)
TABLE = "its gains and shifts, which are no matrix"


def rows(blocks: int) -> Iterator[Row]:
    yield from OUTSIDE
    yield from repeated(BLOCK, "blocks", "transformer_blocks", blocks)


def layout_of_canonical(names: Iterable[str]) -> int:
    return count(list(names), "transformer_blocks")


def layout_of_comfy(names: Iterable[str]) -> int:
    return count(list(names), "blocks")


def _widths(config: Config) -> tuple[int, int]:
    return config.get("caption_channels") or 4096, 0


PIXART = Family(
    title="the transformer of PixArt-Sigma",
    models="PixArt-Sigma",
    short="PixArt-Sigma",
    network="PixArtTransformer2DModel",
    marks=("t_block", "y_embedder"),
    keys=r"adaln_single[._]|caption_projection[._]|cross_attn[._](q|kv)_linear|y_embedder[._]y_proj|t_block[._]1",
    shared=r"transformer_blocks[._]\d+[._](attn[12][._]|ff[._]net)|pos_embed[._]proj",
    license="PixArt-Sigma: CreativeML Open RAIL++-M",
    rows=rows,
    default=128,
    layout_of_canonical=layout_of_canonical,
    layout_of_comfy=layout_of_comfy,
    not_adapted=((r"scale_shift_table|(transformer_)?blocks\.\d+|final_layer", TABLE),),
    width=lambda config: config.get("hidden_size"),
    architecture={None: "pixart-sigma/lora"},
    encoders={4096: Encoder("PixArt's T5-XXL", "CLIPLoader with t5xxl, type pixart")},
    patch=2,
    variance=True,
    least=33,
    one_row=True,
    widths=_widths,
    pooled=False,
    lengths="grouped",
    tokens=128,
    longest=300,
    text_embedder="caption_projection",
    schedule=VPSchedule.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
    pipelines=("PixArtSigmaPipeline",),
    half="float16",
    blocks={
        "BasicTransformerBlock": Block(("ff",)),
        "PixArtMSBlock": Block(("mlp",)),
    },
    cross_attention=True,
    entry="pos_embed.proj",
    ends=r"transformer_blocks\.\d+\.attn2\.to_out\.0",
    steering={
        "nasa": Numbers(0.25),
        "nag": Numbers(5.0),
        "vsf": Numbers(1.0),
        "perp": Numbers(10.0),
    },
)
