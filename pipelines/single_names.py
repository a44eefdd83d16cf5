"""Where the tensors of a U-Net, a VAE and CLIP's text encoders lie in a checkpoint of the original code, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.families import unet
from ..core.targets import is_adaptable

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A tensor of the file, and what of it is one of the module's: all, a third of its rows, or its transpose."""

    key: str
    third: int | None = None
    turned: bool = False

    def shape(self, found: Shape) -> Shape:
        """What `take` makes of a tensor of this shape."""
        if self.third is not None:
            return (found[0] // 3, *found[1:]) if found and found[0] % 3 == 0 else ()
        return found[::-1] if self.turned else found

    def take(self, found: Tensor) -> Tensor:
        if self.third is not None:
            return found.chunk(3)[self.third]
        return found.T if self.turned else found


Sources = dict[str, list[Source]]
"""For each of a module's own names where its tensor may lie, the usual place first."""


def unet_sources(module: nn.Module, prefix: str) -> Sources:
    """Of a UNet2DConditionModel."""
    layers = [path for path, layer in module.named_modules() if is_adaptable(layer)]
    layout = unet.layout_of_canonical(layers)
    places: dict[str, list[str]] = {"conv_norm_out": ["out.0"]}
    for row in unet.rows(layout):
        places.setdefault(row.names[0], []).append(row.host)
    for host, name in unet.parts(layout):
        places.setdefault(name, []).append(host)
    return {name: _at(name, prefix, places.get(name.rpartition(".")[0], [])) for name in module.state_dict()}


def _at(name: str, prefix: str, paths: Iterable[str]) -> list[Source]:
    kind = name.rpartition(".")[2]
    # a name that no table knows lies nowhere: it is missing by its own name
    return [Source(f"{prefix}{path}.{kind}") for path in paths] or [Source(prefix + name)]


# -- the VAE ----------------------------------------------------------------------------------------------------------

# The attention's layers: diffusers' names, then the original ones. Some tools write the former under the old root.
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_sources(module: Any, prefix: str) -> Sources:
    """Of an AutoencoderKL, whose decoder counts its levels the other way round."""
    return {
        name: [Source(prefix + path) for path in _vae_paths(name, len(module.config.block_out_channels))]
        for name in module.state_dict()
    }


def _vae_paths(name: str, levels: int) -> list[str]:
    path = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    path = path.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
    path = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", path)
    path = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", path)
    path = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", path)
    path = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", path)
    path = path.replace("conv_shortcut", "nin_shortcut")
    for theirs, original in VAE_ATTENTION.items():
        if f".attn_1.{theirs}." in path:
            return [path.replace(f".{theirs}.", f".{original}."), path]
    return [path]


# -- text encoders ----------------------------------------------------------------------------------------------------

OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def clip_sources(module: nn.Module, prefix: str) -> Sources:
    """Of a CLIPTextModel, with or without projection: under CLIP's names, older and newer, or open_clip's."""
    names = module.state_dict()
    return {name: [Source(prefix + key, *more) for key, *more in _clip_paths(name, prefix)] for name in names}


def _clip_paths(name: str, prefix: str) -> list[tuple[Any, ...]]:
    bare = name.removeprefix("text_model.")
    if bare == "text_projection.weight":
        # open_clip holds a matrix that is multiplied from the left
        return [("text_projection", None, True), (bare,)]
    own: list[tuple[Any, ...]] = [(f"text_model.{bare}",), (bare,)]
    others = _open_clip_path(bare)
    return [*own, *others] if prefix.endswith("transformer.") else [*others, *own]


def _open_clip_path(bare: str) -> list[tuple[Any, ...]]:
    if bare in OPEN_CLIP:
        return [(OPEN_CLIP[bare],)]
    hit = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", bare)
    if hit is None:
        return []
    layer = f"transformer.resblocks.{hit[1]}"
    if fused := re.fullmatch(r"self_attn\.([qkv])_proj", hit[2]):
        return [(f"{layer}.attn.in_proj_{hit[3]}", "qkv".index(fused[1]))]
    return [(f"{layer}.{OPEN_CLIP_LAYER[hit[2]]}.{hit[3]}",)]
