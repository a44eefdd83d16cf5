"""Chroma (1-HD, 1-Base): Flux' double and single blocks, modulated by what one small network makes of the time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ..schedule import FlowSchedule
from .family import NORM, Block, Config, Encoder, Family, Numbers, first
from .flux import DOUBLE, FLUX, SINGLE, Layout, layout_of_canonical, layout_of_comfy
from .table import Row, repeated

OUTSIDE = (
    Row("img_in", ("x_embedder",)),
    Row("txt_in", ("context_embedder",)),
    Row("final_layer.linear", ("proj_out",)),
)


def _unmodulated(block: Iterable[Row]) -> tuple[Row, ...]:
    return tuple(row for row in block if not row.host.endswith(".lin"))


UNREACHED = "it modulates every block by the time, and no key of a file that diffusers reads finds it in ComfyUI"
NOT_ADAPTED = (
    (r".*\.(query_norm|key_norm|norm_q|norm_k|norm_added_q|norm_added_k)|distilled_guidance_layer\.norms\.\d+", NORM),
    (r"distilled_guidance_layer\.(in_proj|out_proj|layers\.\d+\.((in|out)_layer|linear_[12]))", UNREACHED),
)


def rows(layout: Layout) -> Iterator[Row]:
    yield from OUTSIDE
    yield from repeated(_unmodulated(DOUBLE), "double_blocks", "transformer_blocks", layout.double)
    yield from repeated(_unmodulated(SINGLE), "single_blocks", "single_transformer_blocks", layout.single)


def _widths(config: Config) -> tuple[int, int]:
    return first(config, "joint_attention_dim", "context_in_dim"), 0


CHROMA = Family(
    title="the transformer of Chroma",
    models="Chroma",
    short="Chroma",
    network="ChromaTransformer2DModel",
    marks=("double_blocks", "single_blocks", "img_in", "distilled_guidance_layer"),
    keys=r"distilled_guidance_layer",
    sisters=FLUX.sisters,
    shared=FLUX.shared,
    ratios=FLUX.ratios,
    license="Chroma1-HD and Chroma1-Base: Apache-2.0",
    rows=rows,
    default=Layout(),
    layout_of_canonical=layout_of_canonical,
    layout_of_comfy=layout_of_comfy,
    not_adapted=NOT_ADAPTED,
    width=FLUX.width,
    architecture={None: "chroma/lora"},
    encoders={4096: Encoder("Chroma's T5-XXL", "CLIPLoader with t5xxl, type chroma")},
    patch=2,
    packed=True,
    widths=_widths,
    pooled=False,
    lengths="grouped",
    tokens=128,
    longest=512,
    # as its authors draw it; ComfyUI's loader has Flux' shift until a ModelSampling node says 1
    schedule=FlowSchedule(1.0),
    divided=1000,
    prompts="alone",
    pipelines=("ChromaPipeline",),
    blocks={
        "ChromaTransformerBlock": Block(("ff", "ff_context"), picture=1),
        "ChromaSingleTransformerBlock": Block(("",), sequence="text first"),
        "DoubleStreamBlock": FLUX.blocks["DoubleStreamBlock"],
        "SingleStreamBlock": replace(FLUX.blocks["SingleStreamBlock"], own=""),
    },
    entry="x_embedder",
    ends=FLUX.ends,
    summary="context_embedder",
    steering={
        "nasa": Numbers(0.25),
        "nag": Numbers(5.0),
        "vsf": Numbers(3.5),
        "perp": Numbers(10.0),
    },
)
