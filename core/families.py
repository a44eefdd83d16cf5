"""Which layers of a network carry adapters, under which canonical names, in either host.

`bind_diffusers` and `bind_comfy` turn a network into its list of targets, in an order that depends on the names alone.
Data and torch.nn: neither host is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import families_dit as dit
from . import families_unet as unet
from .compiled import unwrapped
from .errors import OneStepError
from .families_table import Row, natural
from .targets import Target, is_adaptable, out_features


@dataclass(frozen=True)
class Family:
    """One architecture: how to recognise it, its table, and what is not adapted, with the reason.

    marks: names of the root's children that tell ComfyUI's tree. not_adapted: (pattern of module paths, reason).
    rows: the table of a layout. default: the largest layout known, for files that are read without their base.
    """

    title: str
    diffusers_class: str
    marks: tuple[str, ...]
    default: Any
    layout_of_canonical: Callable[[Iterable[str]], Any]
    layout_of_comfy: Callable[[Iterable[str]], Any]
    rows: Callable[[Any], Iterator[Row]]
    not_adapted: tuple[tuple[str, str], ...]

    def reason(self, path: str) -> str | None:
        """Why the module of this path is not adapted, or None."""
        return next((why for pattern, why in self.not_adapted if re.fullmatch(pattern, path)), None)

    def canonical_names(self, layout: Any) -> set[str]:
        return {name for row in self.rows(layout) for name in row.names}


UNET = Family(
    "the U-Net of SD1.5, SD2 and SDXL",
    "UNet2DConditionModel",
    ("input_blocks", "output_blocks", "time_embed"),
    unet.Layout(),
    unet.layout_of_canonical,
    unet.layout_of_comfy,
    unet.rows,
    unet.NOT_ADAPTED,
)
SD3 = Family(
    "the transformer of SD3 and SD3.5",
    "SD3Transformer2DModel",
    ("joint_blocks", "x_embedder", "y_embedder"),
    dit.Layout(),
    dit.layout_of_canonical,
    dit.layout_of_comfy,
    dit.sd3_rows,
    dit.SD3_NOT_ADAPTED,
)
FLUX = Family(
    "the transformer of Flux",
    "FluxTransformer2DModel",
    ("double_blocks", "single_blocks", "img_in", "vector_in"),
    dit.Layout(),
    dit.layout_of_canonical,
    dit.layout_of_comfy,
    dit.flux_rows,
    dit.FLUX_NOT_ADAPTED,
)
FAMILIES = {"unet": UNET, "sd3": SD3, "flux": FLUX}
NOT_ADAPTED = {name: family.not_adapted for name, family in FAMILIES.items()}

# Class names of either host -> the family that we do not adapt yet.
LATER = {
    "PixArtTransformer2DModel": "PixArt",
    "PixArtMS": "PixArt",
    "QwenImageTransformer2DModel": "Qwen-Image",
    "ZImageTransformer2DModel": "Z-Image",
    "Lumina2Transformer2DModel": "Lumina2",
    "NextDiT": "Lumina2 or Z-Image",
    "ChromaTransformer2DModel": "Chroma",
    "Chroma": "Chroma",
    "Flux2Transformer2DModel": "Flux2",
    "WanTransformer3DModel": "Wan",
    "WanModel": "Wan",
}
# Root modules that only a later family's tree has, where its class has an earlier one's name.
LATER_MARKS = {"double_stream_modulation_img": "Flux2", "distilled_guidance_layer": "Chroma"}


def detect(network: nn.Module) -> str:
    """The family of a network of either host: "unet", "sd3" or "flux"; OneStepError, with a word, for all others."""
    network = unwrapped(network)
    classes = {cls.__name__ for cls in type(network).__mro__}
    children = {name for name, _ in network.named_children()}
    later = [LATER[name] for name in sorted(classes & LATER.keys())]
    later += [title for mark, title in LATER_MARKS.items() if mark in children]
    if later:
        raise OneStepError(f"{later[0]} models cannot be adapted yet: use {_choices()}.")
    for name, family in FAMILIES.items():
        if family.diffusers_class in classes or children.issuperset(family.marks):
            return name
    raise OneStepError(f"A network of class {type(network).__name__} is not known here: use {_choices()}.")


def bind_diffusers(network: nn.Module) -> list[Target]:
    """All targets of a UNet2DConditionModel, SD3Transformer2DModel or FluxTransformer2DModel, in canonical order."""
    name = detect(network)
    layers = dict(_layers(network))
    known = FAMILIES[name].canonical_names(FAMILIES[name].layout_of_canonical(layers))
    _refuse_unknown(name, network, known)
    return _ordered(Target(path, layer) for path, layer in layers.items() if path in known)


def bind_comfy(family: str, diffusion_model: nn.Module, config: Mapping[str, Any] | None = None) -> list[Target]:
    """All targets of ComfyUI's `model.diffusion_model`, in canonical order.

    config: the model's `unet_config`; what it says of the width is compared with the layers, which decide.
    """
    layers = dict(_layers(diffusion_model))
    table = {row.host: row for row in FAMILIES[family].rows(FAMILIES[family].layout_of_comfy(layers))}
    _refuse_unknown(family, diffusion_model, table.keys())
    _check_width(family, layers, config or {})
    targets = (_split(table[path], layer) for path, layer in layers.items() if path in table)
    return _ordered(target for split in targets for target in split)


def unet_parts(network: nn.Module) -> dict[str, nn.Module]:
    """The norms and attentions inside the blocks of either host's U-Net, by diffusers' names."""
    modules, layers = dict(network.named_modules()), [path for path, _ in _layers(network)]
    if UNET.diffusers_class in {cls.__name__ for cls in type(network).__mro__}:
        names = {ours: ours for _, ours in unet.parts(unet.layout_of_canonical(layers))}
    else:
        names = {ours: theirs for theirs, ours in unet.parts(unet.layout_of_comfy(layers))}
    return {ours: modules[path] for ours, path in names.items() if path in modules}


def select(targets: Sequence[Target], which: str) -> list[Target]:
    """The targets of "attention", of "attention+mlp", or "all"."""
    parts = {"attention": ("attn",), "attention+mlp": ("attn", "mlp"), "all": ("attn", "mlp", "rest")}
    if which not in parts:
        raise OneStepError(f'Adapted layers can be "attention", "attention+mlp" or "all", not "{which}".')
    return [target for target in targets if part_of(target.name) in parts[which]]


def part_of(name: str) -> str:
    """ "attn", "mlp" or "rest". The joint output layer of Flux' single blocks counts as attention."""
    if re.search(r"(^|\.)attn[12]?\.|^single_transformer_blocks\.\d+\.proj_out$", name):
        return "attn"
    return "mlp" if re.search(r"\.(ff|ff_context)\.net\.|\.proj_mlp$", name) else "rest"


def _layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, module) for path, module in network.named_modules() if is_adaptable(module))


def _split(row: Row, layer: nn.Module) -> list[Target]:
    """The targets of one layer of ComfyUI's network."""
    inputs = Target(row.host, layer).in_features
    permutation = row.permutation(inputs, out_features(layer))
    slices = row.slices(inputs, out_features(layer))
    return [Target(name, layer, rows, permutation) for name, rows in zip(row.names, slices, strict=True)]


def _ordered(targets: Iterable[Target]) -> list[Target]:
    return sorted(targets, key=lambda target: natural(target.name))


def _weighted(network: nn.Module) -> Iterator[str]:
    """Paths of all modules that hold a weight; of the root's own weights their names."""
    for path, module in network.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        yield from [path] if path and (own or is_adaptable(module)) else own


# What an IP-Adapter puts beside diffusers' own layers: its projection, and processors with weights.
IP_ADAPTER = re.compile(
    r"^encoder_hid_proj\.image_projection_layers\.|^image_proj(\.|$)|\.processor\.(to_[kv]_ip|norm_)"
)


def _refuse_unknown(name: str, network: nn.Module, known: Iterable[str]) -> None:
    """Every weight is either in the table or known as not adapted: a network with others is another architecture."""
    family, known = FAMILIES[name], set(known)
    unknown = (path for path in _weighted(network) if path not in known and not IP_ADAPTER.search(path))
    strange = [path for path in unknown if family.reason(path) is None]
    if strange:
        raise OneStepError(
            f"{len(strange)} layers of this {type(network).__name__} are not part of {family.title}, "
            f"the first: {strange[0]!r}. {_advice(strange[0])}"
        )


def _advice(path: str) -> str:
    if "_orig_mod" in path.split("."):
        return "torch.compile has wrapped a part of it: compile that in place, by its compile(), or afterwards."
    if re.search(r"\.(base_layer|lora_[AB])\b", path):
        return "peft has attached a LoRA: call fuse_lora() and unload_lora_weights(), then it is part of the teacher."
    if re.search(r"\.to_(qkv|kv|added_qkv)$", path):
        return "Its projections are fused: call unfuse_qkv_projections() first."
    return "Use an unmodified base model."


def _check_width(family: str, layers: Mapping[str, nn.Module], config: Mapping[str, Any]) -> None:
    """The width that the config tells must be that of the fused layers, on which their split rests."""
    told = {"flux": config.get("hidden_size"), "sd3": config.get("depth", 0) * 64 or None}.get(family)
    fused = [path for path in layers if path.endswith("qkv")]
    wrong = [path for path in fused if told is not None and Target(path, layers[path]).in_features != told]
    if wrong:
        found = Target(wrong[0], layers[wrong[0]]).in_features
        raise OneStepError(f"The layer {wrong[0]} is {found} wide, but the model's configuration says {told}.")


def _choices() -> str:
    return "SD1.5, SD2, SDXL, SD3, SD3.5 or Flux"
