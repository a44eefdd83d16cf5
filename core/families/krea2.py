"""Krea 2, Raw and Turbo: one stream of text and picture, whose text is fused from several layers of its encoder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..schedule import FlowSchedule, SizeShift
from .family import NORM, Block, Config, Encoder, Family, Numbers, first
from .table import Row, count, repeated

OUTSIDE = (
    Row("first", ("img_in",)),
    Row("tmlp.0", ("time_embed.linear_1",)),
    Row("tmlp.2", ("time_embed.linear_2",)),
    Row("tproj.1", ("time_mod_proj",)),
    Row("txtmlp.1", ("txt_in.linear_1",)),
    Row("txtmlp.3", ("txt_in.linear_2",)),
    Row("txtfusion.projector", ("text_fusion.projector",)),
    Row("last.linear", ("final_layer.linear",)),
)

PROJECTIONS = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "gate": "to_gate", "wo": "to_out.0"}
# The same layers in the stream's blocks and in those that fuse a text.
BLOCK = (
    *(Row(f"attn.{theirs}", (f"attn.{ours}",)) for theirs, ours in PROJECTIONS.items()),
    *(Row(f"mlp.{name}", (f"ff.{name}",)) for name in ("gate", "up", "down")),
)

MODULATION = "modulation that is added to the time's: vectors, no matrix"
MEGAPIXEL = 64 * 64
"""Tokens of 1024 x 1024 pixels."""


@dataclass(frozen=True)
class Layout:
    """Numbers of blocks of each kind; by default more than any model has. layerwise: over a token's layers, refiner:
    over a text's tokens."""

    blocks: int = 64
    layerwise: int = 8
    refiner: int = 8


def rows(layout: Layout) -> Iterator[Row]:
    yield from OUTSIDE
    yield from repeated(BLOCK, "blocks", "transformer_blocks", layout.blocks)
    for kind in ("layerwise", "refiner"):
        theirs, ours = f"txtfusion.{kind}_blocks", f"text_fusion.{kind}_blocks"
        yield from repeated(BLOCK, theirs, ours, getattr(layout, kind))


def layout_of_canonical(names: Iterable[str]) -> Layout:
    return _layout(names, "transformer_blocks", "text_fusion")


def layout_of_comfy(names: Iterable[str]) -> Layout:
    return _layout(names, "blocks", "txtfusion")


def _layout(names: Iterable[str], stream: str, fusion: str) -> Layout:
    names = list(names)
    kinds = (stream, rf"{fusion}\.layerwise_blocks", rf"{fusion}\.refiner_blocks")
    return Layout(*(count(names, kind) for kind in kinds))


def _widths(config: Config) -> tuple[int, int]:
    """Of all tapped layers of a token beside one another, as ComfyUI has them."""
    return first(config, "num_text_layers", "txtlayers") * first(config, "text_hidden_dim", "txtdim"), 0


KREA2 = Family(
    title="the transformer of Krea 2",
    models="Krea 2",
    short="Krea 2",
    network="Krea2Transformer2DModel",
    marks=("txtfusion", "txtmlp", "tproj"),
    keys=r"(text_|txt)fusion[._]|blocks[._]\d+[._]attn[._](to_gate|gate|w[qkvo])([._]|$)"
    r"|blocks[._]\d+[._](ff|mlp)[._](gate|up|down)([._]|$)|(^|[._])(time_mod_proj|tmlp|tproj|txtmlp)[._]",
    shared=r"transformer_blocks[._]\d+[._]attn[._](to_[qkv]|to_out)([._]|$)",
    license="Krea 2: Krea 2 Community License, commercial use below 1 million USD of revenue a year; derivatives' "
    "names begin with Krea, and who serves them to others filters contents",
    rows=rows,
    default=Layout(),
    layout_of_canonical=layout_of_canonical,
    layout_of_comfy=layout_of_comfy,
    not_adapted=(
        (r".*\.(norm[12]|norm_[qk]|prenorm|postnorm|[qk]norm)|txt_in\.norm|txtmlp\.0|(final_layer|last)\.norm", NORM),
        (r"transformer_blocks\.\d+|final_layer|blocks\.\d+\.mod|last\.modulation", MODULATION),
    ),
    architecture={None: "krea-2/lora"},
    encoders={12 * 2560: Encoder("Krea 2's Qwen3-VL-4B", "CLIPLoader with qwen3vl_4b, type krea2")},
    patch=2,
    packed=True,
    widths=_widths,
    pooled=False,
    lengths="grouped",
    tokens=128,
    # ComfyUI's shift for every size, which is Turbo's in diffusers too; Raw's there by the size
    schedule=FlowSchedule(math.exp(1.15), by_steps=SizeShift(MEGAPIXEL, (256, 0.5), (6400, 1.15))),
    largest=6400,
    divided=1000,
    unguided=0.0,
    placed=False,
    prompts="alone",
    pipelines=("Krea2Pipeline",),
    blocks={
        "Krea2TransformerBlock": Block(("ff",), sequence="text first"),
        "Krea2TextFusionBlock": Block(("ff",)),
        "SingleStreamBlock": Block(("mlp",), sequence="text first", own="attn.gate"),  # ComfyUI's
        "TextFusionBlock": Block(("mlp",)),
    },
    ends=r"transformer_blocks\.\d+\.attn\.to_out\.0",
    entry="img_in",
    summary="text_fusion.layerwise_blocks.0.attn.to_q",
    stacked="text_fusion.projector",
    steering={
        "nasa": Numbers(0.25),
        "nag": Numbers(5.0),
        "vsf": Numbers(3.5),
        "perp": Numbers(10.0),
    },
)
