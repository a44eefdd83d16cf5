"""Wan 2.1 and 2.2 of text to video, as models of pictures: blocks with cross-attention to a text of 512 tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..schedule import FlowSchedule
from .family import NORM, Block, Config, Encoder, Family, Numbers
from .table import Row, count, repeated

EMBEDDER = "condition_embedder"
OUTSIDE = (
    Row("text_embedding.0", (f"{EMBEDDER}.text_embedder.linear_1",)),
    Row("text_embedding.2", (f"{EMBEDDER}.text_embedder.linear_2",)),
    Row("time_embedding.0", (f"{EMBEDDER}.time_embedder.linear_1",)),
    Row("time_embedding.2", (f"{EMBEDDER}.time_embedder.linear_2",)),
    Row("time_projection.1", (f"{EMBEDDER}.time_proj",)),
    Row("head.head", ("proj_out",)),
)

ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
BLOCK = (
    *(
        Row(f"{theirs}.{layer}", (f"{ours}.{name}",))
        for theirs, ours in ATTENTIONS.items()
        for layer, name in PROJECTIONS.items()
    ),
    Row("ffn.0", ("ffn.net.0.proj",)),
    Row("ffn.2", ("ffn.net.2",)),
)

TOKENS, WIDTH = 512, 4096
"""Of every text, filled up by zeros that are attended to; and of a token, where a configuration does not say."""

# other families call theirs transformer_blocks, double_blocks and so on, or their layers q_proj and q_linear; one
# dialect's prefix ends as the first of these does
IN_BLOCKS = r"((?<!transformer_)|(?<=lora_transformer_))blocks[._]\d+[._]"


def rows(layout: int) -> Iterator[Row]:
    """layout: the number of blocks."""
    yield from OUTSIDE
    yield from repeated(BLOCK, "blocks", "blocks", layout)


def layout_of(names: Iterable[str]) -> int:
    return count(names, "blocks")


def _widths(config: Config) -> tuple[int, int]:
    return config.get("text_dim", WIDTH), 0


WAN = Family(
    title="the transformer of Wan",
    models="Wan 2.1, Wan 2.2",
    short="Wan",
    network="WanTransformer3DModel",
    marks=("text_embedding", "time_projection", "head"),
    keys=rf"{IN_BLOCKS}((self|cross)_attn[._]([qkvo]|norm_[qk])[._](?!proj|linear)|attn[12][._](to_[qkv]|to_out)|ffn[._])"
    rf"|(text|time)_embedding[._][02]([._]|$)|{EMBEDDER}[._]",
    license="Wan 2.1 and 2.2: Apache-2.0",
    rows=rows,
    default=128,  # blocks, more than any model has
    layout_of_canonical=layout_of,
    layout_of_comfy=layout_of,
    not_adapted=(
        (r"patch_embedding", "a convolution of three dimensions, whose LoRA diffusers does not read"),
        (r".*\.(norm_q|norm_k|norm2|norm3)", NORM),
        (r"blocks\.\d+|head|scale_shift_table", "its modulation, which is no matrix"),
    ),
    dialect="native",
    architecture={None: "wan2.1/lora"},
    encoders={WIDTH: Encoder("Wan's UMT5-XXL", "CLIPLoader with umt5_xxl_fp8_e4m3fn_scaled, type wan")},
    patch=2,
    widths=_widths,
    pooled=False,
    lengths="equal",
    tokens=TOKENS,
    zeros=True,
    text_embedder=f"{EMBEDDER}.text_embedder",
    schedule=FlowSchedule(8.0),  # ComfyUI's; diffusers' schedulers say their own
    prompts="alone",
    experts=((r"high.?noise", "0.875-1"), (r"low.?noise", "0-0.875")),
    pipelines=("WanPipeline",),
    blocks={
        "WanTransformerBlock": Block(("ffn",)),
        "WanAttentionBlock": Block(("ffn",)),  # ComfyUI's
    },
    cross_attention=True,
    entry="patch_embedding",
    ends=r"blocks\.\d+\.attn2\.to_out\.0",
    steering={
        "nasa": Numbers(0.25),
        "nag": Numbers(11.0, tau=3.5, alpha=0.5),
        "vsf": Numbers(1.7, offset=0.2),
        "perp": Numbers(10.0),
    },
)
