"""Files of adapter modules (core.adapter_module): their numbers, and in the header what kind they are, how they are
made and for which family. LoRAs have their own (core.lora_file)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import OneStepError
from .tensor_file import read_header, read_tensors, write_tensors
from .whole_file import short

KEY = "onestep.adapter"
VERSION = 1
Make = Callable[..., Any]
"""(the config's entries by name) -> the module, as a class's ``from_config``. Raises TypeError, ValueError or
OneStepError for a config that is none."""


@dataclass(frozen=True)
class Adapter:
    """What a file holds. module: see core.adapter_module. family: of its base. metadata: the header's other strings."""

    module: Any
    kind: str
    family: str
    metadata: dict[str, str]


def save_adapter(
    path: str | os.PathLike[str], module: Any, family: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``module``'s numbers, buffers included, in float32. The file appears whole or not at all.

    An adapter module that can be filed has a ``kind``, a dataclass ``config`` and a class method ``from_config``.
    """
    told = {"version": VERSION, "kind": module.kind, "family": family, "config": asdict(module.config)}
    tensors = {name: value.detach().float() for name, value in module.state_dict().items()}
    write_tensors(path, tensors, {**(metadata or {}), KEY: json.dumps(told)})


def load_adapter(path: str | os.PathLike[str], makers: Mapping[str, Make], family: str | None = None) -> Adapter:
    """The module of a file, on the CPU. makers: by kind. family: what it should be for; None = any.

    Raises OneStepError for a file that holds none, or one of another kind or family.
    """
    header = read_header(path)
    told = _told(path, header.metadata)
    kind, config = told["kind"], told["config"]
    if kind not in makers:
        raise OneStepError(
            f"{short(Path(path))} holds an adapter of kind {kind!r:.40}, not {_or(makers)}: choose another"
        )
    if family is not None and told["family"] != family:
        raise OneStepError(
            f"{short(Path(path))} was made for {told['family']!r:.40} models, this one is {family!r}: "
            "choose an adapter of its base"
        )
    try:
        module = makers[kind](**config)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise OneStepError(
            f"{short(Path(path))}: its config makes no adapter ({str(error)[:120]}): export it again"
        ) from None
    _fill(path, module, read_tensors(path))
    metadata = {name: value for name, value in header.metadata.items() if name != KEY}
    return Adapter(module, kind, str(told["family"]), metadata)


def read_told(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """ "kind", "family" and "config" of an adapter's header, or None for a file of another sort. Reads no tensor."""
    metadata = read_header(path).metadata
    return _told(path, metadata) if KEY in metadata else None


def refuse_adapter(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Raises OneStepError where a file with this header, which is to be a LoRA, holds an adapter."""
    if KEY in metadata:
        raise OneStepError(
            f"{short(Path(path))} holds an adapter, no LoRA: in ComfyUI Apply Guidance Adapter, Apply Negative Adapter "
            "or Load Control Adapter takes it; onestep inspect says which it is and how Python loads it"
        )


def check_adapter(path: str | os.PathLike[str], module: Any, family: str) -> str:
    """One line that says what was proven: the file gives back ``module``, number for number."""
    read, own = load_adapter(path, {module.kind: type(module).from_config}, family).module, module.state_dict()
    found = read.state_dict()
    wrong = [
        name for name in own if name not in found or not torch.equal(found[name], own[name].detach().cpu().float())
    ]
    if wrong or read.before != module.before or read.after != module.after:
        raise OneStepError(f"{short(Path(path))} does not give back what was written: {wrong[:2]}. Please report it")
    return f"the adapter reads back: {len(found)} tensors on {len(module.before | module.after)} layers, bit for bit"


def _told(path: Any, metadata: Mapping[str, str]) -> dict[str, Any]:
    if KEY not in metadata:
        raise OneStepError(
            f"{short(Path(path))} holds no adapter of this package: a LoRA goes through a LoRA loader; "
            "adapters are made by onestep distill"
        )
    try:
        told = json.loads(metadata[KEY])
        kinds = [type(told[name]) for name in ("version", "kind", "family", "config")]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OneStepError(f"{short(Path(path))}: its header is damaged ({str(error)[:80]}): export it again") from None
    if kinds != [int, str, str, dict] or told["version"] != VERSION:
        raise OneStepError(
            f"{short(Path(path))} is of version {told['version']!r:.20}, known is {VERSION}: update OneStep"
        )
    return told


def _fill(path: Any, module: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` into the module; all of them, in its shapes, finite."""
    own = module.state_dict()
    wrong = sorted(set(own) ^ set(tensors)) + [
        name for name in sorted(set(own) & set(tensors)) if own[name].shape != tensors[name].shape
    ]
    if wrong:
        raise OneStepError(
            f"{short(Path(path))}: {len(wrong)} tensors do not fit its config, {wrong[0][:80]!r} the first: "
            "export it again"
        )
    broken = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if broken:
        raise OneStepError(f"{short(Path(path))}: {broken[0][:80]!r} holds numbers that are not finite: train it again")
    module.load_state_dict(dict(tensors))


def _or(names: Iterable[str]) -> str:
    return " or ".join(repr(name) for name in names)
