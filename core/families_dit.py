"""The transformers of SD3 / SD3.5 and of Flux: ComfyUI's (partly fused) layers and their canonical names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .families_table import Row, count

NORM = "a norm: gains, no matrix"

SD3_OUTSIDE = (
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
SD3_BLOCK = (
    Row("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    Row("x_block.attn.proj", ("attn.to_out.0",)),
    Row("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
    Row("x_block.attn2.proj", ("attn2.to_out.0",)),
    Row("x_block.mlp.fc1", ("ff.net.0.proj",)),
    Row("x_block.mlp.fc2", ("ff.net.2",)),
    Row("x_block.adaLN_modulation.1", ("norm1.linear",)),
    Row("context_block.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    Row("context_block.attn.proj", ("attn.to_add_out",)),
    Row("context_block.mlp.fc1", ("ff_context.net.0.proj",)),
    Row("context_block.mlp.fc2", ("ff_context.net.2",)),
    Row("context_block.adaLN_modulation.1", ("norm1_context.linear",), swapped=True),
)

SD3_NOT_ADAPTED = (
    (r".*\.(ln_q|ln_k|norm_q|norm_k|norm_added_q|norm_added_k)", NORM),
    (r"pos_embed", "the fixed table of positions"),
)

FLUX_OUTSIDE = (
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

FLUX_DOUBLE = (
    Row("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    Row("img_attn.proj", ("attn.to_out.0",)),
    Row("img_mlp.0", ("ff.net.0.proj",)),
    Row("img_mlp.2", ("ff.net.2",)),
    Row("img_mod.lin", ("norm1.linear",)),
    Row("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    Row("txt_attn.proj", ("attn.to_add_out",)),
    Row("txt_mlp.0", ("ff_context.net.0.proj",)),
    Row("txt_mlp.2", ("ff_context.net.2",)),
    Row("txt_mod.lin", ("norm1_context.linear",)),
)

FLUX_SINGLE = (
    Row("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
    # Only in LoRA files: some trainers adapt q, k and v of linear1 without the MLP.
    Row("linear1_qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    Row("linear2", ("proj_out",)),
    Row("modulation.lin", ("norm.linear",)),
)

FLUX_NOT_ADAPTED = ((r".*\.(query_norm|key_norm|norm_q|norm_k|norm_added_q|norm_added_k)", NORM),)


@dataclass(frozen=True)
class Layout:
    """Numbers of SD3's joint or Flux' double blocks, and of Flux' single blocks; by default more than any model has."""

    joint: int = 64
    single: int = 64


def layout_of_canonical(names: Iterable[str]) -> Layout:
    names = list(names)
    return Layout(count(names, "transformer_blocks"), count(names, "single_transformer_blocks"))


def layout_of_comfy(names: Iterable[str]) -> Layout:
    names = list(names)
    return Layout(max(count(names, "joint_blocks"), count(names, "double_blocks")), count(names, "single_blocks"))


def sd3_rows(layout: Layout) -> Iterator[Row]:
    yield from SD3_OUTSIDE
    yield from _blocks(SD3_BLOCK, "joint_blocks", "transformer_blocks", layout.joint)


def flux_rows(layout: Layout) -> Iterator[Row]:
    yield from FLUX_OUTSIDE
    yield from _blocks(FLUX_DOUBLE, "double_blocks", "transformer_blocks", layout.joint)
    yield from _blocks(FLUX_SINGLE, "single_blocks", "single_transformer_blocks", layout.single)


def _blocks(block: tuple[Row, ...], host: str, canonical: str, size: int) -> Iterator[Row]:
    for i in range(size):
        for row in block:
            yield Row(f"{host}.{i}.{row.host}", tuple(f"{canonical}.{i}.{name}" for name in row.names), row.swapped)
