"""Weights of a checkpoint file in scaled fp8, W = s Q: which they are, and where the scales lie. All else is refused.

Two ways of writing are read, as ComfyUI reads them: a tensor `scaled_fp8` and `X.scale_weight` beside `X.weight`; and
`X.weight_scale` beside it, with `X.comfy_quant` or the header's _quantization_metadata naming the format. What would
round the inputs of products (`scale_input`, `input_scale`) is left out: nothing is rounded here but weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..core.errors import OneStepError
from ..core.stored import FLOAT8
from ..core.tensor_file import Header, read_tensors

SCALE = re.compile(r"(?P<layer>.+)\.(scale_weight|weight_scale)")
BESIDE = re.compile(r"((.+\.)?scaled_fp8|.+\.(scale_weight|weight_scale|scale_input|input_scale|comfy_quant))")
"""Tensors beside the weights that are understood."""
PACKED = re.compile(
    r"(^|\.)(\w*(absmax|quant_state|quant_map|qweight|qzeros)|weight_(scale_2|s_rel|s_channel|codebook)"
    r"|pre_quant_scale)(\.|$)"
)
FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
INSTEAD = "use the file in fp16, bf16, fp32 or fp8"


@dataclass(frozen=True)
class Scales:
    """The scale of each weight, by its key. beside: keys that are no part of a module."""

    of: Mapping[str, Tensor] = field(default_factory=dict)
    beside: frozenset[str] = frozenset()

    def without(self, header: Header) -> Header:
        """The header's tensors that are parts of modules."""
        kept = {key: entry for key, entry in header.tensors.items() if key not in self.beside}
        return replace(header, tensors=kept)

    def widened(self, key: str, stored: Tensor) -> Tensor:
        """s Q in float32 of a weight that has a scale, else the tensor as it is."""
        scale = self.of.get(key)
        return stored if scale is None else stored.float() * shaped(scale, stored)


def shaped(scale: Tensor, weight: Tensor) -> Tensor:
    """A scale, one or one for each output row, so that it multiplies a weight."""
    return scale.float().reshape(-1, *[1] * (weight.ndim - 1)) if scale.numel() > 1 else scale.float().reshape(())


def scales_of(path: Path, header: Header) -> Scales:
    """Raises OneStepError for what is quantised in another way, and for a scale that is missing, broken or too many."""
    _refuse_packed(path, header)
    named = {hit["layer"] + ".weight": key for key in header.tensors if (hit := SCALE.fullmatch(key))}
    formats = _formats(path, header)
    for layer, name in formats.items():
        if name not in FORMATS:
            _refuse(path, f"holds {layer[-80:]} in the format {name[:40]!r}, which is not served: {INSTEAD}")
    marked = {layer + ".weight" for layer in formats}
    roots = [key.removesuffix("scaled_fp8") for key in header.tensors if key.endswith("scaled_fp8")]
    for key, entry in header.tensors.items():
        scaled = key in marked or (entry.dtype in FLOAT8 and key.startswith(tuple(roots)) and key.endswith(".weight"))
        if scaled and key not in named:
            _refuse(path, f"is damaged: {key[-80:]} is scaled fp8, and its scale is missing; download it again")
    scales = read_tensors(path, named.values())
    for weight, key in named.items():
        _check(path, header, weight, key, scales[key], formats.get(weight.removesuffix(".weight")))
    beside = frozenset(key for key in header.tensors if BESIDE.fullmatch(key))
    return Scales({weight: scales[key] for weight, key in named.items()}, beside)


def _check(path: Path, header: Header, weight: str, key: str, scale: Tensor, told: str | None) -> None:
    entry = header.tensors.get(weight)
    if entry is None:
        _refuse(path, f"is damaged: it holds {key[-80:]} without {weight[-80:]}; download it again")
    if entry.dtype not in FLOAT8 or (told is not None and entry.dtype != FORMATS[told]):
        _refuse(path, f"is damaged: {weight[-80:]} has a scale of fp8, and is {entry.dtype}; download it again")
    if not scale.is_floating_point() or scale.numel() not in (1, entry.shape[0] if entry.shape else 1):
        _refuse(
            path,
            f"holds {key[-80:]} as {scale.dtype} {list(scale.shape)}, where one number belongs, or one for each of "
            f"{entry.shape[0] if entry.shape else 1} rows: {INSTEAD}",
        )
    if not bool((scale.float().isfinite() & (scale.float() > 0)).all()):
        _refuse(path, f"is damaged: {key[-80:]} is not a finite number above 0; download it again")


def _formats(path: Path, header: Header) -> dict[str, str]:
    """The format of each layer that names one."""
    marks = [key for key in header.tensors if key.endswith(".comfy_quant")]
    said: dict[str, Any] = {}
    try:
        said |= json.loads(header.metadata.get("_quantization_metadata", "{}")).get("layers", {})
        for key, mark in read_tensors(path, marks).items():
            said[key.removesuffix(".comfy_quant")] = json.loads(mark.to(torch.uint8).numpy().tobytes())
        return {layer: str(conf["format"]) for layer, conf in said.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        _refuse(path, f"says how its layers are quantised in a way that cannot be read: {INSTEAD}")


def _refuse_packed(path: Path, header: Header) -> None:
    """Weights that are packed into whole numbers, or scaled by blocks."""
    for key in header.tensors:
        if PACKED.search(key):
            _refuse(path, f"holds {key[-80:]}: its weights are quantised, which is not supported: {INSTEAD}")


def _refuse(path: Path, what: str) -> NoReturn:
    raise OneStepError(f"{path.name[:80]} {what}")
