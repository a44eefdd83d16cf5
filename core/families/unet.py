"""The U-Net of SD1.5, SD2 and SDXL: diffusers' names and ComfyUI's names of every layer that can carry an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..schedule import VPSchedule
from .family import Block, Config, Encoder, Family, Numbers
from .table import Row, count

# The layers of a residual block: ComfyUI's name -> diffusers' name.
RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}

# The layers of one transformer block have the same names in both hosts.
TRANSFORMER = (
    *(f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)

# What stands beside a layer and is no matrix: the ends of both paths in ComfyUI's names, then in diffusers'.
BESIDE = (
    ("in_layers.2", "in_layers.0", "conv1", "norm1"),
    ("out_layers.3", "out_layers.0", "conv2", "norm2"),
    ("proj_in", "norm", "proj_in", "norm"),
    *((layer, part, layer, part) for layer, part in (("attn1.to_q", "attn1"), ("attn2.to_q", "attn2"))),
    *(("ff.net.2", f"norm{i}", "ff.net.2", f"norm{i}") for i in (1, 2, 3)),
)

# label_emb holds SDXL's embedding of the pooled text and sizes (in SD2 unCLIP, which is no base here, class_embedding).
OUTSIDE = (
    Row("input_blocks.0.0", ("conv_in",)),
    Row("time_embed.0", ("time_embedding.linear_1",)),
    Row("time_embed.2", ("time_embedding.linear_2",)),
    Row("label_emb.0.0", ("add_embedding.linear_1",)),
    Row("label_emb.0.2", ("add_embedding.linear_2",)),
    Row("out.2", ("conv_out",)),
)

NOT_ADAPTED = (
    (r".*\.norm[123]?", "a norm: gains and shifts, no matrix"),
    (r".*\.(in_layers|out_layers)\.0", "a norm: gains and shifts, no matrix"),
    (r"conv_norm_out|out\.0", "a norm: gains and shifts, no matrix"),
    (r"time_embedding\.cond_proj", "the guidance embedding of an LCM U-Net; only diffusers has it"),
)


@dataclass(frozen=True)
class Layout:
    """Residual blocks per level on the way down and up (in the order of diffusers' up_blocks), deepest transformer."""

    down: tuple[int, ...] = (2, 2, 2, 2)
    up: tuple[int, ...] = (3, 3, 3, 3)
    depth: int = 10


def layout_of_canonical(names: Iterable[str]) -> Layout:
    """Read from diffusers' module paths; the largest known where they are a selection without residual blocks."""
    names = list(names)
    if not any(".resnets." in name for name in names):
        return Layout()
    down = tuple(count(names, rf"down_blocks\.{x}\.resnets") for x in range(count(names, r"down_blocks")))
    up = tuple(count(names, rf"up_blocks\.{x}\.resnets") for x in range(count(names, r"up_blocks")))
    return Layout(down, up, count(names, r".*\.transformer_blocks"))


def layout_of_comfy(names: Iterable[str]) -> Layout:
    """Read from ComfyUI's module paths: a level ends where the picture is resampled."""
    names = list(names)
    down = _levels(names, "input_blocks", r"input_blocks\.(\d+)\.0\.op", first=1)
    up = _levels(names, "output_blocks", r"output_blocks\.(\d+)\.[12]\.conv", first=0)
    # A down level's last block holds the resampling alone; an up level's last block also holds a residual block.
    down = tuple(size - 1 for size in down[:-1]) + down[-1:]
    return Layout(down, up, count(names, r".*\.transformer_blocks"))


def _levels(names: list[str], blocks: str, ends: str, first: int) -> tuple[int, ...]:
    """Blocks per level, the ones that end a level included."""
    last = count(names, blocks)
    stops = sorted({int(found[1]) + 1 for name in names if (found := re.fullmatch(ends, name))} | {last})
    return tuple(stop - start for start, stop in zip([first, *stops], stops, strict=False))


def rows(layout: Layout) -> Iterator[Row]:
    """Every layer that a U-Net of this layout can have; a level without attention simply lacks some of them."""
    yield from OUTSIDE
    yield from _down(layout)
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0", layout.depth)
    yield from _resnet("middle_block.2", "mid_block.resnets.1")
    yield from _up(layout)


def parts(layout: Layout) -> Iterator[tuple[str, str]]:
    """(ComfyUI's path, diffusers' path) of every norm and attention inside the blocks."""
    for row in rows(layout):
        for host_end, host_part, end, part in BESIDE:
            if row.host.endswith(f".{host_end}") and row.names[0].endswith(f".{end}"):
                yield row.host.removesuffix(host_end) + host_part, row.names[0].removesuffix(end) + part


def _down(layout: Layout) -> Iterator[Row]:
    block = 1
    for level, size in enumerate(layout.down):
        yield from _level("input_blocks", block, f"down_blocks.{level}", size, layout.depth)
        block += size
        yield Row(f"input_blocks.{block}.0.op", (f"down_blocks.{level}.downsamplers.0.conv",))
        block += 1


def _up(layout: Layout) -> Iterator[Row]:
    block = 0
    for level, size in enumerate(layout.up):
        yield from _level("output_blocks", block, f"up_blocks.{level}", size, layout.depth)
        block += size
        # Behind an attention the upsampling is the block's third member, else its second.
        for place in (1, 2):
            yield Row(f"output_blocks.{block - 1}.{place}.conv", (f"up_blocks.{level}.upsamplers.0.conv",))


def _level(host: str, first: int, canonical: str, size: int, depth: int) -> Iterator[Row]:
    """A level's residual blocks, each with its transformer: ComfyUI counts them through all levels."""
    for i in range(size):
        yield from _resnet(f"{host}.{first + i}.0", f"{canonical}.resnets.{i}")
        yield from _attention(f"{host}.{first + i}.1", f"{canonical}.attentions.{i}", depth)


def _resnet(host: str, canonical: str) -> Iterator[Row]:
    for theirs, ours in RESNET.items():
        yield Row(f"{host}.{theirs}", (f"{canonical}.{ours}",))


def _attention(host: str, canonical: str, depth: int) -> Iterator[Row]:
    for layer in ("proj_in", "proj_out"):
        yield Row(f"{host}.{layer}", (f"{canonical}.{layer}",))
    for i in range(depth):
        for layer in TRANSFORMER:
            path = f"transformer_blocks.{i}.{layer}"
            yield Row(f"{host}.{path}", (f"{canonical}.{path}",))


def _widths(config: Config) -> tuple[int, int]:
    """SDXL's pooled text lies before the embeddings of its six sizes."""
    if "cross_attention_dim" in config:
        width, told = config["cross_attention_dim"], config.get("projection_class_embeddings_input_dim")
        sizes = 6 * (config.get("addition_time_embed_dim") or 0)
    else:
        width, told, sizes = config["context_dim"], config.get("adm_in_channels"), 6 * 256
    return (width if isinstance(width, int) else width[0]), max(0, (told or sizes) - sizes)


UNET = Family(
    title="the U-Net of SD1.5, SD2 and SDXL",
    models="SD1.5, SD2, SDXL",
    short="U-Nets",
    network="UNet2DConditionModel",
    marks=("input_blocks", "output_blocks", "time_embed"),
    keys=r"(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)[._]|(?m:^unet\.)",
    license=(
        "SD1.5: CreativeML OpenRAIL-M; SDXL: OpenRAIL++-M; Illustrious, Animagine and Pony: Fair AI Public, changes "
        "are shared; NoobAI: that, and nothing of it is sold"
    ),
    rows=rows,
    default=Layout(),
    layout_of_canonical=layout_of_canonical,
    layout_of_comfy=layout_of_comfy,
    not_adapted=NOT_ADAPTED,
    dialect="kohya",
    architecture={
        768: "stable-diffusion-v1/lora",
        1024: "stable-diffusion-v2-512/lora",
        2048: "stable-diffusion-xl-v1-base/lora",
    },
    encoders={
        768: Encoder("SD1.5's CLIP-L", "CLIPLoader, type stable_diffusion"),
        1024: Encoder("SD2's CLIP-H", "CLIPLoader, type stable_diffusion"),
        2048: Encoder("SDXL's CLIP-L and CLIP-G", "DualCLIPLoader, type sdxl"),
    },
    patch=1,
    widths=_widths,
    pooled=False,
    lengths="repeated",
    tokens=77,
    schedule=VPSchedule.scaled_linear(),
    pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    second=lambda config: config.get("addition_embed_type") == "text_time",
    half="float16",
    blocks={
        "ResnetBlock2D": Block(),
        "ResBlock": Block(),
        "BasicTransformerBlock": Block(("ff",)),
    },
    unet=True,
    cross_attention=True,
    entry="conv_in",
    ends=r".+\.attn2\.to_out\.0",
    summary="add_embedding.linear_1",
    steering={
        "nasa": Numbers(0.25),
        "nag": Numbers(3.0, alpha=0.5),
        "vsf": Numbers(1.0),
        "perp": Numbers(10.0),
    },
)
