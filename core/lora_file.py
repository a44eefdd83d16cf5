"""LoRA files that ComfyUI's LoraLoader and diffusers' load_lora_weights both read, and the reading of everybody else's.

Written: in the family's dialect, U-Nets in kohya's names with `.alpha` (= rank), transformers in peft's names without,
by diffusers' paths or, where ComfyUI finds none of those, by its own.
Both hosts map every one of these keys, but of a family of two files (core.lora_second); of peft's names for U-Nets
ComfyUI loses the attention. May import torch and core.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter_file import refuse_adapter
from .errors import OneStepError
from .families import FAMILIES, choices
from .lora_fused import Host, apart, written
from .lora_keys import (
    GUESTS,
    TEXT_ENCODER,
    KeyMap,
    Place,
    family_of_keys,
    parse,
    refuse_adapters,
    refuse_families,
    refuse_kinds,
)
from .lora_scales import PeftScales, alpha_of
from .lora_variants import refuse_variant
from .router import refuse_router
from .targets import Target
from .tensor_file import Entry, digest, read_header, read_tensors, write_tensors

MAX_RANK = 4096
MAX_BYTES = 4 * 2**30

State = dict[str, tuple[Tensor, Tensor]]


class AnotherBase(OneStepError):
    """The LoRA adapts layers that are not among those that it is read for."""


@dataclass(frozen=True)
class LoraFile:
    """state: (A, B) by canonical target name, float32, alpha == rank; A [r, in, ...], B [out, r, ...].

    recipe: the JSON text under onestep.recipe, or None. metadata: all other strings of the header.
    unused: keys that are no part of the denoiser: text encoders, and the embeddings of trigger words. doubt: what is to
    be said where the file does not tell which of like models it is for.
    """

    state: State
    family: str
    recipe: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    doubt: str = ""

    @property
    def left_out(self) -> str:
        """What of the file does not act, in words; "" where all of it does."""
        texts = sum(TEXT_ENCODER.match(key) is not None for key in self.unused)
        kinds = {"of text encoders": texts, "of embeddings and marks": len(self.unused) - texts}
        told = " and ".join(f"{count} keys {kind}" for kind, count in kinds.items() if count)
        return f"{told} are left out: the denoiser's layers alone act" if told else ""

    @property
    def said(self) -> str:
        """What is to be said of the file where it is put to use, in words; "" where there is nothing."""
        return "; ".join(filter(None, (self.left_out, self.doubt)))

    def say_left_out(self, path: str | os.PathLike[str]) -> None:
        """Warn of what does not act, and of what is not told, where the file is put to use."""
        if self.said:
            logging.warning("OneStep: %s: %s", Path(path).name[:80], self.said)


def save_lora(
    path: str | os.PathLike[str],
    state: Mapping[str, tuple[Tensor, Tensor]],
    family: str,
    recipe: str | None = None,
    metadata: Mapping[str, str] | None = None,
    host: Host = "diffusers",
) -> None:
    """Write (A, B) by target name; alpha is the rank. The file appears whole or not at all.

    recipe: JSON text of how to sample. metadata: further header strings, e.g. ss_steps; they win over what is derived.
    host: whose own loader is to read it, where no one file serves both.
    Ranks that differ are filled up with zeros: a file without alpha must hold one rank to be read by every diffusers.
    """
    _check_state(state)
    rank = max(len(a) for a, _ in state.values())
    tensors = written(of_one_rank(state), family, host)
    derived = _derived_metadata(Path(path), state, family, rank) | dict(metadata or {})
    derived["modelspec.hash_sha256"] = digest(tensors)
    if recipe is not None:
        derived["onestep.recipe"] = recipe
    write_tensors(path, tensors, derived)


def load_lora(path: str | os.PathLike[str], names: Iterable[str] | None = None, family: str | None = None) -> LoraFile:
    """Read our own LoRA or anybody's: kohya, peft, diffusers, ai-toolkit, ComfyUI; fused layers come apart exactly.

    names: all target names of the base; then a LoRA of another base is refused, and unusual U-Nets are named rightly.
    family: what the LoRA should be for; read from the file when None.
    """
    names = None if names is None else set(names)
    header = read_header(path)
    refuse_adapter(path, header.metadata)
    refuse_router(Path(path), header.metadata)
    unused = {key for key in header.tensors if TEXT_ENCODER.match(key) or GUESTS.match(key)}
    keys = [key for key in header.tensors if key not in unused]
    refuse_kinds(keys)
    refuse_adapters(keys)
    refuse_families(keys, family or header.metadata.get("onestep.family"))
    family = _family(path, {key: header.tensors[key] for key in keys}, header.metadata, family)
    doubt = refuse_variant(Path(path), family, {key: header.tensors[key].shape for key in keys}, header.metadata)
    _check_entries(path, {key: header.tensors[key] for key in keys})
    state = _assemble(read_tensors(path, keys), KeyMap(family, names), header.metadata)
    _check_state(state)
    _refuse_foreign(state, names, family)
    metadata = dict(header.metadata)
    recipe = metadata.pop("onestep.recipe", None)
    return LoraFile(state, family, recipe, metadata, tuple(sorted(unused)), doubt)


def of_one_rank(state: Mapping[str, tuple[Tensor, Tensor]]) -> State:
    """The same products in float32 on the CPU, all of the largest rank: filled up with zeros."""
    rank = max(len(a) for a, _ in state.values())
    return {name: (_filled(a, 0, rank), _filled(b, 1, rank)) for name, (a, b) in state.items()}


def fit(state: Mapping[str, tuple[Tensor, Tensor]], targets: Sequence[Target]) -> State:
    """The factors in the shapes of these targets; raises OneStepError where the LoRA was made for another base.

    A 1 x 1 convolution and a Linear hold the same numbers; files write either for either.
    """
    by_name = {target.name: target for target in targets}
    _refuse_foreign(state, by_name, "")
    fitted: State = {}
    for name, (a, b) in state.items():
        shapes = by_name[name].shape_a(len(a)), by_name[name].shape_b(len(a))
        if a.numel() != torch.Size(shapes[0]).numel() or b.numel() != torch.Size(shapes[1]).numel():
            raise OneStepError(
                f"This LoRA was made for another base: {name} has factors {list(a.shape)} and {list(b.shape)}, "
                f"this model needs {list(shapes[0])} and {list(shapes[1])}. Choose the base that it was trained on."
            )
        fitted[name] = a.reshape(shapes[0]), b.reshape(shapes[1])
    return fitted


# Reading


def _family(path: Any, entries: Mapping[str, Entry], metadata: Mapping[str, str], wanted: str | None) -> str:
    shapes = {key: entry.shape for key, entry in entries.items()}
    found = metadata.get("onestep.family") or family_of_keys(entries, wanted, shapes) or wanted
    if found not in FAMILIES:
        raise OneStepError(
            f"{Path(path).name[:80]} holds no LoRA of a known model "
            f"(its first key: {next(iter(entries), '')[:80]!r}). Use a LoRA of {choices()}."
        )
    if wanted is not None and wanted != found:
        raise OneStepError(
            f"{Path(path).name[:80]} is a LoRA for {FAMILIES[found].title}, "
            f"but this model is {FAMILIES[wanted].title}. Choose a LoRA of this model."
        )
    return found


def _check_entries(path: Any, entries: Mapping[str, Entry]) -> None:
    """Before anything large is read: a checkpoint in a LoRA's place is found by its names alone."""
    for key in entries:
        parse(key)
    total = sum(entry.stop - entry.start for entry in entries.values())
    if total > MAX_BYTES:
        raise OneStepError(
            f"{Path(path).name[:80]} holds {total / 2**30:.1f} GiB, more than {MAX_BYTES / 2**30:.0f}: "
            "too much for a LoRA, choose another."
        )


def _assemble(tensors: Mapping[str, Tensor], keys: KeyMap, metadata: Mapping[str, str]) -> State:
    """Pair up A, B and alpha of each layer, fold alpha, take fused layers apart."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, part = parse(key)
        layers.setdefault(path, {})[part] = tensor
    scales = PeftScales(metadata)
    state: State = {}
    for path, parts in sorted(layers.items()):
        place = keys.find(path)
        if place is None:
            raise OneStepError(f"The LoRA adapts {path[:120]!r}, {keys.why_not(path)}: choose another LoRA.")
        for name, factors in _apart(place, *_factors(path, parts, scales)).items():
            if name in state:
                raise OneStepError(f"The LoRA adapts {name} twice, under two names: export it again in one format.")
            state[name] = factors
    return state


def _factors(path: str, parts: Mapping[str, Tensor], scales: PeftScales) -> tuple[Tensor, Tensor]:
    """A and B in float32 with alpha / rank folded into B: untouched where alpha is the rank."""
    if "a" not in parts or "b" not in parts:
        raise OneStepError(f"The LoRA lacks one of the two factors of {path[:120]!r}: download or export it again.")
    a, b = parts["a"], parts["b"]
    if not a.is_floating_point() or not b.is_floating_point():
        raise OneStepError(f"The LoRA's factors of {path[:120]!r} are whole numbers (quantised): use the plain LoRA.")
    a, b = a.float(), b.float()
    right = a.ndim in (2, 4) and b.ndim in (2, 4) and b.shape[1] == len(a) and 1 <= len(a) <= MAX_RANK
    if not right or not a.numel() or not b.numel():
        raise OneStepError(
            f"The LoRA's factors of {path[:120]!r} have shapes {list(a.shape)} and {list(b.shape)}, "
            f"which are no A and B of one rank up to {MAX_RANK}: choose another LoRA."
        )
    b = b.reshape(*b.shape[:2], *(1 for _ in a.shape[2:])) if b.shape[2:].numel() == 1 else b
    scale = alpha_of(parts["alpha"], path) / len(a) if "alpha" in parts else scales.of(path, len(a))
    return a, b if scale == 1.0 else (b.double() * scale).float()


def _apart(place: Place, a: Tensor, b: Tensor) -> State:
    """A fused layer's rows become targets of their own, each with a copy of A; swapped rows return to their order."""
    if place.row is None:
        return {place.names[0]: (a, b)}
    permutation = place.row.permutation(a.shape[1], len(b))
    b = b if permutation is None else b[permutation]
    return apart(place.row, a, b)


# Checks and header


def _refuse_foreign(state: Mapping[str, Any], names: Iterable[str] | None, family: str) -> None:
    foreign = [] if names is None else sorted(set(state) - set(names))
    if foreign:
        raise AnotherBase(
            f"This LoRA was made for another base: {len(foreign)} of its {len(state)} layers are not among those "
            f"adapted in this model, {foreign[0]!r} the first. Choose the base that it was trained on."
        )


def _check_state(state: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    if not state:
        raise OneStepError("This LoRA adapts no layer of the model: choose another file.")
    broken = [name for name, factors in state.items() if not all(bool(f.isfinite().all()) for f in factors)]
    if broken:
        raise OneStepError(
            f"The adapters of {len(broken)} layers hold numbers that are not finite (NaN or infinite), "
            f"{broken[0]} the first: go back to an earlier state or file."
        )


def _filled(factor: Tensor, axis: int, rank: int) -> Tensor:
    """Float32 with zeros behind its own rank: the product stays the same."""
    missing = list(factor.shape)
    missing[axis] = rank - factor.shape[axis]
    factor = factor.detach().to("cpu", torch.float32)
    return torch.cat([factor, factor.new_zeros(missing)], axis) if missing[axis] else factor


def _derived_metadata(path: Path, state: Mapping[str, tuple[Tensor, Tensor]], family: str, rank: int) -> dict[str, str]:
    told = {
        "onestep.family": family,
        "onestep.format": "1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_output_name": path.stem,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": path.stem,
    }
    text_widths = (a.shape[1] for name, (a, _) in state.items() if name.endswith("attn2.to_k"))
    words = FAMILIES[family].architecture
    known = words.get(next(text_widths, None)) or words.get(None)
    return told | ({"modelspec.architecture": known} if known else {})
