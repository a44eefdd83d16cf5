"""Anima: Cosmos-Predict2's transformer of 2 B, whose text an adapter of a small language model makes once a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..schedule import FlowSchedule
from .family import NORM, Block, Config, Encoder, Family, Numbers, first
from .table import Row, count, repeated

OUTSIDE = (
    Row("x_embedder.proj.1", ("patch_embed.proj",)),
    Row("t_embedder.1.linear_1", ("time_embed.t_embedder.linear_1",)),
    Row("t_embedder.1.linear_2", ("time_embed.t_embedder.linear_2",)),
    Row("final_layer.adaln_modulation.1", ("norm_out.linear_1",)),
    Row("final_layer.adaln_modulation.2", ("norm_out.linear_2",)),
    Row("final_layer.linear", ("proj_out",)),
)

ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0"}
MODULATIONS = {"self_attn": "norm1", "cross_attn": "norm2", "mlp": "norm3"}
BLOCK = (
    *(
        Row(f"{theirs}.{layer}", (f"{ours}.{name}",))
        for theirs, ours in ATTENTIONS.items()
        for layer, name in PROJECTIONS.items()
    ),
    Row("mlp.layer1", ("ff.net.0.proj",)),
    Row("mlp.layer2", ("ff.net.2",)),
    *(
        Row(f"adaln_modulation_{theirs}.{at}", (f"{ours}.linear_{at}",))
        for theirs, ours in MODULATIONS.items()
        for at in (1, 2)
    ),
)

TOKENS = 512
"""Of every text, filled up by zeros that are attended to."""


def rows(layout: int) -> Iterator[Row]:
    """layout: the number of blocks."""
    yield from OUTSIDE
    yield from repeated(BLOCK, "blocks", "transformer_blocks", layout)


def layout_of_canonical(names: Iterable[str]) -> int:
    return count(names, "transformer_blocks")


def layout_of_comfy(names: Iterable[str]) -> int:
    return count(names, "blocks")


def _widths(config: Config) -> tuple[int, int]:
    return first(config, "text_embed_dim", "crossattn_emb_channels"), 0


ANIMA = Family(
    title="the transformer of Anima",
    models="Anima",
    short="Anima",
    network="CosmosTransformer3DModel",
    marks=("llm_adapter", "x_embedder", "t_embedding_norm"),
    keys=r"(^|[._])blocks[._]\d+[._]((self|cross)_attn[._](q|k|v|output)_proj|mlp[._]layer[12]|adaln_modulation_)"
    r"|transformer_blocks[._]\d+[._]norm[123][._]linear_[12][._]",
    shared=r"transformer_blocks[._]\d+[._](attn[12][._]to_|ff[._]net[._])",
    license="Anima: CircleStone non-commercial 1.2, by which derivatives may be sold",
    rows=rows,
    default=128,  # blocks, more than any model has
    layout_of_canonical=layout_of_canonical,
    layout_of_comfy=layout_of_comfy,
    not_adapted=(
        (r".*\.(q_norm|k_norm|norm_q|norm_k)|t_embedding_norm|time_embed\.norm", NORM),
        (r"llm_adapter\..*", "it makes the text, once for each prompt; in diffusers it is a model of its own"),
    ),
    dialect="native",
    encoders={1024: Encoder("Anima's Qwen3-0.6B", "CLIPLoader with qwen_3_06b_base")},
    patch=2,
    widths=_widths,
    pooled=False,
    lengths="equal",
    token_ids="t5xxl_ids",
    text_adapter="llm_adapter",
    tokens=TOKENS,
    zeros=True,
    schedule=FlowSchedule(3.0),
    divided=1000,
    prompts="alone",
    pipelines=("AnimaModularPipeline",),
    blocks={
        "CosmosTransformerBlock": Block(("ff",)),
        "Block": Block(("mlp",)),  # ComfyUI's
    },
    fused_rotary=True,
    cross_attention=True,
    entry="patch_embed.proj",
    ends=r"transformer_blocks\.\d+\.attn2\.to_out\.0",
    steering={
        "nasa": Numbers(0.25),
        "nag": Numbers(5.0),
        "vsf": Numbers(1.0),
        "perp": Numbers(10.0),
    },
)
