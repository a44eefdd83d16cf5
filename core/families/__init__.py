"""The families of models that are served, each in a file of its own, and which layers of a network carry adapters.

`bind_diffusers` and `bind_comfy` turn a network into its list of targets, in an order that depends on the names alone.
Data and torch.nn: neither host is imported. How a family is added: docs/adding-a-family.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

from torch import nn

from ..compiled import unwrapped
from ..errors import OneStepError
from ..targets import Target, is_adaptable, out_features
from . import unet
from .anima import ANIMA
from .chroma import CHROMA
from .family import Block, Encoder
from .flux import FLUX
from .flux2 import FLUX2
from .krea2 import KREA2
from .later import LATER, LATER_MARKS, LATER_NAMES, LATER_PIPELINES
from .lumina2 import LUMINA2
from .pixart import PIXART
from .qwen import QWEN_IMAGE
from .sd3 import SD3
from .table import Row, natural
from .unet import UNET
from .wan import WAN
from .z_image import Z_IMAGE

FAMILIES = {
    "unet": UNET,
    "sd3": SD3,
    "flux": FLUX,
    "z_image": Z_IMAGE,
    "flux2": FLUX2,
    "qwen_image": QWEN_IMAGE,
    "anima": ANIMA,
    "krea2": KREA2,
    "wan": WAN,
    "chroma": CHROMA,
    "lumina2": LUMINA2,
    "pixart": PIXART,
}
"""By the name that files and recipes have for them, for ever."""
STEERING = {name: family.steering for name, family in FAMILIES.items() if family.steering}


def of_class(name: str) -> str | None:
    """The name of the family whose networks have the class ``name`` in diffusers."""
    return next((family for family, known in FAMILIES.items() if known.network == name), None)


def detect(network: nn.Module) -> str:
    """The name of the family of a network of either host; OneStepError, with a word, for one that is not served."""
    network = unwrapped(network)
    classes = {cls.__name__ for cls in type(network).__mro__}
    children = {name for name, _ in (*network.named_children(), *network.named_parameters(recurse=False))}
    variants = [title for mark, title in LATER_MARKS.items() if _has(network, mark)]
    for name, family in FAMILIES.items():
        marked = [mark in children or "." in mark and _has(network, mark) for mark in family.marks]
        if not variants and (family.network in classes or marked and all(marked)):
            return name
    later = [*variants, *(LATER[name] for name in sorted(classes & LATER.keys()))]
    if later:
        raise OneStepError(f"{later[0]} models cannot be adapted yet: use {choices()}.")
    raise OneStepError(f"A network of class {type(network).__name__} is not known here: use {choices()}.")


def _has(network: nn.Module, path: str) -> bool:
    """Whether there is anything at ``path``, a module, a weight or a setting that is on."""
    start: Any = network
    found = reduce(lambda inside, name: getattr(inside, name, None), path.split("."), start)
    return found is not None and found is not False


def named(family: str, name: str) -> str:
    """Whose a network of ``family`` is by its file's ``name``, where it is another model's; "" where it is not."""
    titles = LATER_NAMES.items()
    return next((title for (own, way), title in titles if own == family and re.search(way, name.lower())), "")


def refuse_name(family: str, name: str) -> None:
    """Raises OneStepError for a network of ``family`` whose file's ``name`` is another model's."""
    if title := named(family, name):
        raise OneStepError(f"{name[:80]} is {title}, which is not served: use {choices()}.")


def refuse_pipeline(name: str) -> None:
    """Raises OneStepError for a pipeline of this class whose network is another's than it looks."""
    if name in LATER_PIPELINES:
        raise OneStepError(f"{LATER_PIPELINES[name]} models cannot be adapted yet: use {choices()}.")


def bind_diffusers(network: nn.Module) -> list[Target]:
    """All targets of diffusers' network, in canonical order."""
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
    if UNET.network in {cls.__name__ for cls in type(network).__mro__}:
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
    """ "attn", "mlp" or "rest". The joint layers of Flux' single blocks count as attention."""
    if re.search(r"(^|\.)(attn[12]?|attention)\.|^single_transformer_blocks\.\d+\.proj_out$", name):
        return "attn"
    mlp = r"\.(ffn?|ff_context|(img|txt)_mlp)\.(net\.|linear_|(gate|up|down)$)|\.proj_mlp$|\.feed_forward\."
    return "mlp" if re.search(mlp, name) else "rest"


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """What gradient checkpointing recomputes one by one: a network's blocks, of either host, in the tree's order."""
    kinds = FAMILIES[detect(network)].blocks
    return [module for module in network.modules() if type(module).__name__ in kinds]


def in_place_of(network: nn.Module) -> list[nn.Module]:
    """Layers whose input ComfyUI overwrites after they have kept it for backward."""
    kinds = FAMILIES[detect(network)].blocks
    return [getattr(block, name) for block in blocks_of(network) for name in kinds[type(block).__name__].in_place]


def block_of(block: nn.Module) -> Block:
    """What is known of a block. Two families' classes may have one name: what is inside tells."""
    inside, kind = dict(block.named_modules()), type(block).__name__
    known = [family.blocks[kind] for family in FAMILIES.values() if kind in family.blocks]
    alike = [block for block in known if any(path in inside for path in block.feed_forwards)]
    own = [block for block in alike if block.own and block.own in inside]
    return next(iter(own or [block for block in alike if not block.own]), Block())


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
    told = FAMILIES[family].width(config)
    fused = [path for path in layers if path.endswith("qkv")]
    wrong = [path for path in fused if told is not None and Target(path, layers[path]).in_features != told]
    if wrong:
        found = Target(wrong[0], layers[wrong[0]]).in_features
        raise OneStepError(f"The layer {wrong[0]} is {found} wide, but the model's configuration says {told}.")


def check_size(name: str, family: str, size: tuple[int, int], factor: int) -> None:
    """Raises OneStepError for a ``size`` (width, height) in pixels that the model ``name`` is not drawn at. factor:
    pixels along a side of one of its latents."""
    known = FAMILIES[family]
    unit = math.lcm(8, factor * known.patch * (2 if known.even else 1))
    if sum(size) // 2 // factor < known.least:
        raise OneStepError(
            f"{name} draws from {known.least * factor} pixels on, in the mean of both sides (of fewer "
            f"ComfyUI places no token), not {size[0]}x{size[1]}: take larger sizes"
        )
    if any(side % unit or side < unit for side in size):
        why = " (at others diffusers and ComfyUI place its tokens differently)" * known.even
        nearest = math.ceil if known.least > 1 else round  # a smaller one may be too small
        width, height = (max(unit, nearest(side / unit) * unit) for side in size)
        raise OneStepError(
            f"{name} draws sizes that are multiples of {unit} pixels{why}, not {size[0]}x{size[1]}: "
            f"take {width}x{height}"
        )


def refuse_text(family: str, config: Mapping[str, Any], found: int) -> None:
    """Raises OneStepError where text tokens are ``found`` wide, and a network of this configuration, either host's,
    reads others: its text encoder is another model's."""
    wanted, _ = FAMILIES[family].widths(config)
    if found == wanted:
        return
    whose = [known.encoders[found].name for known in FAMILIES.values() if found in known.encoders]
    whose[2:] = ["others"] * (len(whose) > 2)
    right = FAMILIES[family].encoders.get(wanted, Encoder("its own text encoder", "the loader of its template"))
    raise OneStepError(
        f"the text encoder gives tokens of {found} numbers{', as ' * bool(whose)}{' or '.join(whose)}, and this model "
        f"reads {wanted}: load {right.name} (in ComfyUI: {right.loader})"
    )


def refuse_pooled(family: str, width: int, pooled: bool) -> None:
    """Raises OneStepError where tokens of ``width`` are several families', and a pooled text, or that there is none,
    tells that their text encoder is another's."""
    known = FAMILIES[family]
    alike = [other for other in FAMILIES.values() if width in other.encoders and other.pooled != known.pooled]
    if known.unet or pooled == known.pooled or not alike or width not in known.encoders:
        return
    right, found = known.encoders[width], " or ".join(other.encoders[width].name for other in alike if not other.unet)
    raise OneStepError(
        f"the text encoder gives a text with{'' if pooled else 'out'} a pooled one, as {found}, and this model reads "
        f"{right.name}: load that (in ComfyUI: {right.loader})"
    )


def refuse_short(family: str, tokens: int) -> None:
    """Raises OneStepError where a text of ``tokens`` is shorter than its own encoder gives every one."""
    known = FAMILIES[family]
    if known.zeros and not known.token_ids and tokens < known.tokens:
        right = next(iter(known.encoders.values()))
        raise OneStepError(
            f"the text encoder gives a text of {tokens} tokens, and this model reads {known.tokens}, zeros behind its "
            f"own: load {right.name} (in ComfyUI: {right.loader})"
        )


def choices(names: Iterable[str] = FAMILIES) -> str:
    """The models of these families, for a person; of all that are served."""
    *most, last = ", ".join(FAMILIES[name].models for name in names).split(", ")
    return f"{', '.join(most)} or {last}"
