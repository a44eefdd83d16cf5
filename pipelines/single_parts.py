"""The modules of a single-file checkpoint: made from their configurations, asked for their tensors by name, filled."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from ..core.errors import OneStepError
from ..core.families import blocks_of
from ..core.stored import FLOAT8, STORED, hold
from ..core.tensor_file import Header, each_tensor
from .quiet import quiet
from .single_names import Source, Sources, clip_sources, unet_sources
from .single_scaled import Scales, shaped


@dataclass(frozen=True)
class Part:
    """One module of the pipeline, which lies under one of the prefixes.

    own: keys behind the prefix that are this architecture's, so that one which the module does not ask for tells
    another architecture; all others are what a training or another tool left. spared: what may be absent as a whole.
    """

    title: str
    name: str
    prefixes: tuple[str, ...]
    sources: Callable[[Any, str], Sources]
    own: str
    spared: str = r"(?!)"


def places_of(path: Path, header: Header, part: Part, folder: Path) -> dict[str, Source]:
    """Where each of the module's tensors lies. Raises OneStepError that names what is missing, or too much.

    folder: of the kind's configurations.
    """
    module, keys = empty(folder, part.name), header.tensors
    prefix = next((prefix for prefix in part.prefixes if any(key.startswith(prefix) for key in keys)), None)
    if prefix is None:
        raise OneStepError(
            f"{path.name[:80]} holds no {part.title}: use a whole checkpoint, or give the diffusers folder that holds "
            "model_index.json instead"
        )
    wanted = part.sources(module, prefix)
    found = {name: source for name, places in wanted.items() for source in places[::-1] if source.key in keys}
    _refuse_missing(path, part, wanted, found, folder.name)
    _refuse_more(path, part, prefix, keys, {source.key for source in found.values()}, folder.name)
    _check_shapes(path, header, part, module, found, folder.name)
    return found


def _refuse_missing(path: Path, part: Part, wanted: Sources, found: dict[str, Source], kind: str) -> None:
    missing = [name for name in wanted if name not in found]
    spared = [name for name in wanted if re.match(part.spared, name)]
    if missing and missing != spared:
        raise OneStepError(
            f"{path.name[:80]} is incomplete, or of another architecture than {kind}: its {part.title} lacks "
            f"{listed([wanted[name][0].key for name in missing])}. Use a whole checkpoint"
        )


def _refuse_more(path: Path, part: Part, prefix: str, keys: Iterable[str], used: set[str], kind: str) -> None:
    behind = len(prefix)
    more = [key for key in keys if key.startswith(prefix) and key not in used and re.match(part.own, key[behind:])]
    if more:
        raise OneStepError(
            f"{path.name[:80]} is of another architecture than {kind}: its {part.title} also holds {listed(more)}. Use "
            "a checkpoint of SD1.5, SD2 or SDXL"
        )


def _check_shapes(
    path: Path, header: Header, part: Part, module: nn.Module, found: dict[str, Source], kind: str
) -> None:
    weights = module.state_dict()
    for name, source in found.items():
        entry, shape = header.tensors[source.key], tuple(weights[name].shape)
        if not entry.dtype.is_floating_point:
            raise OneStepError(
                f"{path.name[:80]} holds {source.key[-100:]} as {entry.dtype}: its weights are quantised, which is not "
                "supported: use the file in fp16, bf16, fp32 or plain fp8"
            )
        if _squeezed(source.shape(entry.shape)) != _squeezed(shape):
            raise OneStepError(
                f"{path.name[:80]} is of another architecture than {kind}: {source.key[-100:]} of its {part.title} is "
                f"{list(entry.shape)}, where {list(shape)} belongs"
            )


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """Without ones at the end: a 1x1 convolution and a matrix hold the same."""
    kept = list(shape)
    while kept and kept[-1] == 1:
        kept.pop()
    return tuple(kept)


def empty(folder: Path, name: str) -> Any:
    """The module of a configuration, without memory."""
    library, cls = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))[name]
    config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"), quiet():
        if library == "diffusers":
            return getattr(diffusers, cls).from_config(config)
        found = getattr(transformers, cls)
        return found(found.config_class(**config))


def filled(
    path: Path, part: Part, found: dict[str, Source], folder: Path, dtype: torch.dtype, scales: Scales, stored: bool
) -> Any:
    """The module with its tensors, each read and cast alone. stored: as in `load_single_file`."""
    module = empty(folder, part.name)
    shapes = {name: weight.shape for name, weight in module.state_dict().items()}
    kept = {name for name in _storable(module) if stored and name in found} if part.sources is unet_sources else set()
    users: dict[str, list[str]] = {}
    for name, source in found.items():
        users.setdefault(source.key, []).append(name)
    state, held = {}, {}
    for key, tensor in each_tensor(path, users):
        for name in users[key]:
            if name in kept and tensor.dtype in FLOAT8:
                state[name], held[name] = tensor.reshape(shapes[name]), scales.of.get(key)
                continue
            wide = found[name].take(scales.widened(key, tensor))
            state[name] = wide.to(dtype, copy=len(users[key]) > 1).reshape(shapes[name]).contiguous()
    if part.sources is clip_sources:
        return _encoder(module, state, dtype)
    network = _network(module, state)
    for name, scale in held.items():
        layer = network.get_submodule(name.removesuffix(".weight"))
        hold(layer, None if scale is None else shaped(scale, layer.weight))
    return network


def _storable(network: nn.Module) -> Iterator[str]:
    """Names of the weights that may stay in fp8: of linear and convolution layers inside its blocks."""
    inside = {layer for block in blocks_of(network) for layer in block.modules() if type(layer) in STORED}
    return (f"{name}.weight" for name, layer in network.named_modules() if layer in inside)


def _network(module: Any, state: dict[str, Tensor]) -> Any:
    given = {name.split(".")[0] for name in state}
    for name in {name.split(".")[0] for name in module.state_dict()} - given:
        setattr(module, name, None)  # what may be absent
    module.load_state_dict(state, assign=True)
    return module.eval()


def _encoder(module: Any, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """By transformers, which makes the buffers that no file holds."""
    return type(module).from_pretrained(None, config=module.config, state_dict=state, torch_dtype=dtype).eval()


def listed(names: Sequence[str]) -> str:
    """The first two of ``names``, and how many more there are."""
    shown = ", ".join(name[-80:] for name in names[:2])
    return shown + (f" and {len(names) - 2} more" if len(names) > 2 else "")
