"""Z-Image and Z-Image-Turbo: one stream of text and picture, after two blocks of refining for each alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..schedule import FlowSchedule
from .family import NORM, Block, Config, Encoder, Family, Numbers
from .table import QKV, Row, count, repeated

OUTSIDE = (
    Row("x_embedder", ("all_x_embedder.2-1",)),
    Row("cap_embedder.1", ("cap_embedder.1",)),
    Row("t_embedder.mlp.0", ("t_embedder.mlp.0",)),
    Row("t_embedder.mlp.2", ("t_embedder.mlp.2",)),
    Row("final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",)),
    Row("final_layer.linear", ("all_final_layer.2-1.linear",)),
)

# The text's refiner alone has no modulation.
BLOCK = (
    Row("attention.qkv", ("attention.to_q", "attention.to_k", "attention.to_v"), widths=QKV),
    Row("attention.out", ("attention.to_out.0",)),
    *(Row(name, (name,)) for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")),
)

TOKENS = 32
"""Text and picture are each filled up to a multiple of so many tokens, by learnt ones that are attended to."""


@dataclass(frozen=True)
class Layout:
    """Numbers of blocks of each kind; by default more than any model has."""

    layers: int = 64
    noise_refiner: int = 8
    context_refiner: int = 8


def rows(layout: Layout) -> Iterator[Row]:
    yield from OUTSIDE
    for name in ("layers", "noise_refiner", "context_refiner"):
        yield from repeated(BLOCK, name, name, getattr(layout, name))


def layout_of(names: Iterable[str]) -> Layout:
    """The blocks are named alike in both hosts."""
    names = list(names)
    return Layout(*(count(names, kind) for kind in ("layers", "noise_refiner", "context_refiner")))


def widths(config: Config) -> tuple[int, int]:
    return config["cap_feat_dim"], 0


Z_IMAGE = Family(
    title="the transformer of Z-Image",
    models="Z-Image",
    short="Z-Image",
    network="ZImageTransformer2DModel",
    marks=("noise_refiner", "x_pad_token"),
    keys=r"(noise_refiner|context_refiner|(^|[._])layers)[._]\d+[._](attention[._]to_|adaLN_modulation[._]0[._])"
    r"|all_(x_embedder|final_layer)[._]",
    shared=r"(noise_refiner|context_refiner|(^|[._])layers)[._]\d+[._](attention[._](qkv|out)|feed_forward[._]w[123])"
    r"[._]",
    ratios=((r"attention[._]qkv", 3.0), (r"feed_forward[._]w1", 8 / 3)),
    license="Z-Image and Z-Image-Turbo: Apache-2.0",
    rows=rows,
    default=Layout(),
    layout_of_canonical=layout_of,
    layout_of_comfy=layout_of,
    not_adapted=(
        (r".*\.(q_norm|k_norm|norm_q|norm_k|attention_norm[12]|ffn_norm[12])|cap_embedder\.0", NORM),
        (r"(x|cap)_pad_token", "the token that fills a sequence up"),
    ),
    width=lambda config: config.get("dim"),
    architecture={None: "z-image/lora"},
    encoders={2560: Encoder("Z-Image's Qwen3-4B", "CLIPLoader with qwen_3_4b, type lumina2")},
    patch=2,
    innermost=True,
    widths=widths,
    pooled=False,
    lengths="grouped",
    one_stream=True,
    filled=TOKENS,
    tokens=128,
    schedule=FlowSchedule(3.0),
    remaining=True,
    unguided=0.0,
    prompts="first half",
    pipelines=("ZImagePipeline",),
    blocks={
        "ZImageTransformerBlock": Block(("feed_forward",), sequence="picture first", filled=TOKENS),
        "JointTransformerBlock": Block(("feed_forward",), sequence="text first", filled=TOKENS),
    },
    entry="all_x_embedder.2-1",
    ends=r"layers\.\d+\.attention\.to_out\.0",
    summary="cap_embedder.1",
    steering={
        "nasa": Numbers(0.25),
        "nag": Numbers(5.0),
        "vsf": Numbers(3.5),
        "perp": Numbers(10.0),
    },
)
