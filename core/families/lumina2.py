"""Lumina-Image 2.0 and NetaYume: Z-Image's forerunner, whose keys and values are narrower than its queries."""

from __future__ import annotations

from collections.abc import Iterator

from ..schedule import FlowSchedule
from .family import NORM, Block, Encoder, Family, Numbers
from .table import INPUT, REST, Row, repeated
from .z_image import Layout, layout_of, widths

TIME, TEXT = "time_caption_embed.timestep_embedder", "time_caption_embed.caption_embedder"
OUTSIDE = (
    Row("x_embedder", ("x_embedder",)),
    Row("cap_embedder.1", (f"{TEXT}.1",)),
    Row("t_embedder.mlp.0", (f"{TIME}.linear_1",)),
    Row("t_embedder.mlp.2", (f"{TIME}.linear_2",)),
    Row("final_layer.adaLN_modulation.1", ("norm_out.linear_1",)),
    Row("final_layer.linear", ("norm_out.linear_2",)),
)

# The text's refiner alone has no modulation.
BLOCK = (
    Row("attention.qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), widths=(INPUT, REST, REST)),
    Row("attention.out", ("attn.to_out.0",)),
    *(Row(f"feed_forward.w{at}", (f"feed_forward.linear_{at}",)) for at in (1, 2, 3)),
    Row("adaLN_modulation.1", ("norm1.linear",)),
)

START = "<Prompt Start>"
SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts."
)
"""Of Lumina2Pipeline, and of ComfyUI's CLIPTextEncodeLumina2 where nobody chooses another."""


def rows(layout: Layout) -> Iterator[Row]:
    yield from OUTSIDE
    for name in ("layers", "noise_refiner", "context_refiner"):
        yield from repeated(BLOCK, name, name, getattr(layout, name))


LUMINA2 = Family(
    title="the transformer of Lumina 2",
    models="Lumina 2",
    short="Lumina 2",
    network="Lumina2Transformer2DModel",
    marks=("noise_refiner", "cap_embedder", "layers.0.adaLN_modulation.1"),
    keys=r"(noise_refiner|context_refiner|(^|[._])layers)[._]\d+[._](attn|norm1|feed_forward[._]linear|adaLN_modulation"
    r"[._]1)[._]|time_caption_embed[._]",
    shared=r"(noise_refiner|context_refiner|(^|[._])layers)[._]\d+[._](attention[._](qkv|out)|feed_forward[._]w[123])"
    r"[._]",
    ratios=((r"attention[._]qkv", 5 / 3), (r"feed_forward[._]w1", 4.0)),
    license="Lumina-Image 2.0 and NetaYume: Apache-2.0",
    rows=rows,
    default=Layout(),
    layout_of_canonical=layout_of,
    layout_of_comfy=layout_of,
    not_adapted=(
        (r".*\.(q_norm|k_norm|norm_q|norm_k|attention_norm[12]|ffn_norm[12]|norm[12]|norm1\.norm)", NORM),
        (rf"cap_embedder\.0|{TEXT}\.0", NORM),
    ),
    width=lambda config: config.get("dim"),
    dialect="each",
    architecture={None: "lumina-2/lora"},
    encoders={2304: Encoder("Lumina 2's Gemma-2-2B", "CLIPLoader with gemma_2_2b_fp16, type lumina2")},
    patch=2,
    innermost=True,
    widths=widths,
    pooled=False,
    lengths="grouped",
    one_stream=True,
    tokens=128,
    system=SYSTEM,
    start=START,
    schedule=FlowSchedule(6.0),
    remaining=True,
    token_norm="row",
    prompts="alone",
    pipelines=("Lumina2Pipeline",),
    blocks={
        "Lumina2TransformerBlock": Block(("feed_forward",), sequence="text first"),
        "JointTransformerBlock": Block(("feed_forward",), sequence="text first", own="adaLN_modulation.1"),
    },
    entry="x_embedder",
    ends=r"layers\.\d+\.attn\.to_out\.0",
    summary=f"{TEXT}.1",
    steering={
        "nasa": Numbers(0.25),
        "nag": Numbers(5.0),
        "vsf": Numbers(3.5),
        "perp": Numbers(10.0),
    },
)
