"""The factors of a LoRA under the keys of a file, where layers that ComfyUI fuses may be one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from .errors import OneStepError
from .families import FAMILIES
from .families.table import Row
from .lora_keys import alpha_key_of, key_of

Host = Literal["comfyui", "diffusers"]
Factors = tuple[Tensor, Tensor]


def written(state: Mapping[str, Factors], family: str, host: Host) -> dict[str, Tensor]:
    """The tensors of a file for ``host``, of factors of one rank that is alpha."""
    if FAMILIES[family].dialect == "each" and host == "comfyui":
        return _fused(state, family)
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in state.items():
        down, up = key_of(family, name)
        tensors |= {down: a, up: b}
        alpha = alpha_key_of(family, name)
        if alpha is not None:
            tensors[alpha] = torch.tensor(float(len(a)))
    return tensors


def _fused(state: Mapping[str, Factors], family: str) -> dict[str, Tensor]:
    """Under ComfyUI's paths: the factors of a fused layer's parts side by side, at the sum of their ranks."""
    known = FAMILIES[family]
    tensors: dict[str, Tensor] = {}
    for row in known.rows(known.default):
        found = [state[name] for name in row.names if name in state]
        if found and len(found) < len(row.names):
            lacking = next(name for name in row.names if name not in state)
            raise OneStepError(
                f"ComfyUI holds {', '.join(row.names)} in one layer, and {lacking} is not adapted: adapt all of them"
            )
        if found:
            path = f"diffusion_model.{row.host}"
            tensors[f"{path}.lora_A.weight"] = torch.cat([a for a, _ in found])
            tensors[f"{path}.lora_B.weight"] = torch.block_diag(*(b for _, b in found))
    return tensors


def apart(row: Row, a: Tensor, b: Tensor) -> dict[str, Factors]:
    """The parts of a fused layer: each with its own factors where they lie side by side, else with a copy of A."""
    slices = [rows or slice(None) for rows in row.slices(a.shape[1], len(b))]
    rank = len(a) // len(slices)
    own = [slice(part * rank, (part + 1) * rank) for part in range(len(slices))]
    others = b.clone()
    for rows, columns in zip(slices, own, strict=True):
        others[rows, columns] = 0
    if rank * len(slices) != len(a) or len(slices) == 1 or bool(others.any()):
        own = [slice(None)] * len(slices)
    parts = zip(row.names, slices, own, strict=True)
    return {name: (a[columns].clone(), b[rows, columns].clone()) for name, rows, columns in parts}
