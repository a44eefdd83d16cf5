"""SD3 and SD3.5: two streams, text and picture, that attend jointly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..schedule import FlowSchedule
from .family import NORM, SQUARE, Block, Config, Encoder, Family, Numbers
from .table import QKV, Row, count, repeated

OUTSIDE = (
    Row("x_embedder.proj", ("pos_embed.proj",)),
    Row("context_embedder", ("context_embedder",)),
    Row("t_embedder.mlp.0", ("time_text_embed.timestep_embedder.linear_1",)),
    Row("t_embedder.mlp.2", ("time_text_embed.timestep_embedder.linear_2",)),
    Row("y_embedder.mlp.0", ("time_text_embed.text_embedder.linear_1",)),
    Row("y_embedder.mlp.2", ("time_text_embed.text_embedder.linear_2",)),
    Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
    Row("final_layer.linear", ("proj_out",)),
)

# The last block's norm1_context is [2 h, h] and swapped, see Row; that of the others is not.
BLOCK = (
    Row("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), widths=QKV),
    Row("x_block.attn.proj", ("attn.to_out.0",)),
    Row("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v"), widths=QKV),
    Row("x_block.attn2.proj", ("attn2.to_out.0",)),
    Row("x_block.mlp.fc1", ("ff.net.0.proj",)),
    Row("x_block.mlp.fc2", ("ff.net.2",)),
    Row("x_block.adaLN_modulation.1", ("norm1.linear",)),
    Row("context_block.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), widths=QKV),
    Row("context_block.attn.proj", ("attn.to_add_out",)),
    Row("context_block.mlp.fc1", ("ff_context.net.0.proj",)),
    Row("context_block.mlp.fc2", ("ff_context.net.2",)),
    Row("context_block.adaLN_modulation.1", ("norm1_context.linear",), swapped=True),
)

NOT_ADAPTED = (
    (r".*\.(ln_q|ln_k|norm_q|norm_k|norm_added_q|norm_added_k)", NORM),
    (r"pos_embed", "the fixed table of positions"),
)


def rows(blocks: int) -> Iterator[Row]:
    yield from OUTSIDE
    yield from repeated(BLOCK, "joint_blocks", "transformer_blocks", blocks)


def _canonical(names: Iterable[str]) -> int:
    return count(names, "transformer_blocks")


def _comfy(names: Iterable[str]) -> int:
    return count(names, "joint_blocks")


def _widths(config: Config) -> tuple[int, int]:
    if "joint_attention_dim" in config:
        return config["joint_attention_dim"], config["pooled_projection_dim"]
    return config["context_embedder_config"]["params"]["in_features"], config["adm_in_channels"]


SD3 = Family(
    title="the transformer of SD3 and SD3.5",
    models="SD3, SD3.5",
    short="SD3",
    network="SD3Transformer2DModel",
    marks=("joint_blocks", "x_embedder", "y_embedder"),
    keys=r"joint_blocks[._]\d",
    shared=r"transformer_blocks[._]\d+[._](attn2?[._]|norm1|ff)",
    ratios=(SQUARE,),
    license=(
        "SD3 and SD3.5: Stability AI Community; not used, nor their outputs, "
        '"to create or improve any foundational generative AI model (excluding the Models or Derivative Works)"'
    ),
    rows=rows,
    default=64,
    layout_of_canonical=_canonical,
    layout_of_comfy=_comfy,
    not_adapted=NOT_ADAPTED,
    width=lambda config: config.get("depth", 0) * 64 or None,
    architecture={None: "stable-diffusion-3/lora"},
    encoders={4096: Encoder("SD3's CLIP-L and CLIP-G, with T5-XXL or without", "TripleCLIPLoader")},
    patch=2,
    widths=_widths,
    pooled=True,
    lengths="equal",
    tokens=77 + 256,
    schedule=FlowSchedule(3.0),
    pipelines=("StableDiffusion3Pipeline",),
    blocks={
        "JointTransformerBlock": Block(("ff", "ff_context"), picture=1),
        "JointBlock": Block(("x_block.mlp", "context_block.mlp"), picture=1),
    },
    entry="pos_embed.proj",
    ends=r"transformer_blocks\.\d+\.attn\.to_out\.0",
    summary="time_text_embed.text_embedder.linear_1",
    steering={
        "nasa": Numbers(0.25),
        "nag": Numbers(5.0, alpha=0.125),
        "vsf": Numbers(3.5),
        "perp": Numbers(10.0),
    },
)
