"""The modules of a diffusers folder, each from its own best files: plain weights or a variant's, whole or in shards."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from ..core.errors import OneStepError
from ..core.tensor_file import read_header
from .quiet import attempt
from .single_scaled import BESIDE, PACKED

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
OPTIONAL = {"text_encoder_3": "T5"}
"""Parts that a pipeline draws without, though its index may name them."""


def load_parts(folder: Path, index: Mapping[str, Any], names: tuple[str, ...], dtype: torch.dtype) -> dict[str, Any]:
    """The modules of ``names`` that the index has. Raises OneStepError that names what is missing."""
    found: dict[str, Any] = {}
    for name in names:
        if index.get(name) in (None, [None, None]):
            continue
        if name in OPTIONAL and not any((folder / name).glob("*.safetensors")):
            logging.warning("OneStep: %s has no %s weights (%s): it draws without", folder.name, OPTIONAL[name], name)
            found |= {name: None, name.replace("text_encoder", "tokenizer"): None}
            continue
        found[name] = load_part(folder / name, index[name], dtype)
    return found


def load_part(folder: Path, entry: Any, dtype: torch.dtype) -> Any:
    """One module. entry: of model_index.json, [library, class]."""
    cls = _class_of(folder, entry)
    variant = best_variant(folder, STEMS[entry[0]], dtype)
    if not _has_quantiser(folder):
        _refuse_whole_numbers(folder, variants(folder, STEMS[entry[0]])[variant])
    module, info = attempt(
        folder,
        lambda: cls.from_pretrained(
            folder,
            torch_dtype=dtype,
            variant=variant or None,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        ),
    )
    _refuse_quantised(folder, info["unexpected_keys"])
    missing = sorted({*info["missing_keys"], *(name for name, weight in module.named_parameters() if weight.is_meta)})
    if missing:
        more = f" and {len(missing) - 2} more" if len(missing) > 2 else ""
        raise OneStepError(
            f"{folder.parent.name[:60]}/{folder.name} is incomplete: its {variant or 'plain'} weights lack "
            f"{', '.join(name[-80:] for name in missing[:2])}{more}. Download or save it again"
        )
    return module


def _refuse_quantised(folder: Path, more: Iterable[str]) -> None:
    """diffusers would leave scales out, and compute with the numbers that they belong to."""
    for key in more:
        if BESIDE.fullmatch(key) or PACKED.search(key):
            raise OneStepError(
                f"{folder.parent.name[:60]}/{folder.name} holds {key[-80:]}: its weights are quantised, and a folder's "
                "are read plain. Use it in fp16, bf16 or fp32, or a single file in scaled fp8"
            )


def _has_quantiser(folder: Path) -> bool:
    """Whether the module says which of diffusers' or transformers' quantisers reads its weights."""
    try:
        return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _refuse_whole_numbers(folder: Path, files: Iterable[str]) -> None:
    """diffusers would take them for the weights' own numbers."""
    for name in files:
        for key, entry in read_header(folder / name).tensors.items():
            if key.endswith((".weight", ".bias")) and not entry.dtype.is_floating_point:
                raise OneStepError(
                    f"{folder.parent.name[:60]}/{folder.name} holds {key[-80:]} as {entry.dtype}: its weights are "
                    "quantised, and a folder's are read plain. Use it in fp16, bf16 or fp32"
                )


def best_variant(folder: Path, stem: str, dtype: torch.dtype) -> str:
    """The variant of which all files are there: none (""), else that of ``dtype``, else the widest."""
    found = variants(folder, stem)
    if not found:
        raise OneStepError(
            f"{folder.parent.name[:60]}/{folder.name} holds no weights ({stem}.safetensors, or a variant's like "
            f"{stem}.fp16.safetensors): download or save it again"
        )
    order = ["", DTYPES.get(dtype, ""), *DTYPES.values(), "ema"]
    ranked = sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))
    lacking = {name: _lacking(folder, stem, name, found[name]) for name in ranked}
    whole = [name for name in ranked if not lacking[name]]
    if not whole:
        raise OneStepError(
            f"{folder.parent.name[:60]}/{folder.name} is incomplete: its {ranked[0] or 'plain'} weights lack the file "
            f"{lacking[ranked[0]][:100]}. Download or save it again"
        )
    return whole[0]


def variants(folder: Path, stem: str) -> dict[str, list[str]]:
    """The files of each variant; shards carry their number behind the variant, in older folders before it."""
    pattern = rf"{stem}(\.(?P<variant>[\w-]+?))?(-\d+-of-\d+)?(\.(?P<older>[\w-]+))?\.safetensors"
    found: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if hit := re.fullmatch(pattern, file.name):
            found.setdefault(hit["variant"] or hit["older"] or "", []).append(file.name)
    return found


def _lacking(folder: Path, stem: str, variant: str, files: list[str]) -> str:
    """The first file of a variant that is not there; "" where all are."""
    ending = f".{variant}" if variant else ""
    if f"{stem}{ending}.safetensors" in files:
        return ""
    index = folder / f"{stem}.safetensors.index{ending}.json"
    try:
        wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return next((str(name) for name in sorted(wanted) if not (folder / name).is_file()), "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return index.name


def _class_of(folder: Path, entry: Any) -> Any:
    library, name = entry if isinstance(entry, list) and len(entry) == 2 else ("", entry)
    cls = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise OneStepError(
            f"{folder.parent.name[:60]}'s model_index.json says that {folder.name} is {str(entry)[:80]}, which is not "
            "known here: use a folder that diffusers saved"
        )
    return cls
