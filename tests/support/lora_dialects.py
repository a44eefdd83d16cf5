"""LoRA files of one adapter in everybody's names, with everybody's alphas and dtypes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from onestep.core.families import FAMILIES

Factors = Mapping[str, tuple[Tensor, Tensor]]
File = tuple[dict[str, Tensor], dict[str, str]]


def flat(name: str) -> str:
    return name.replace(".", "_")


def peft(prefix: str, adapter: str = "") -> Callable[[Factors], dict[str, Tensor]]:
    middle = f"{adapter}.weight" if adapter else "weight"

    def written(factors: Factors) -> dict[str, Tensor]:
        pairs = ((name, letter, x) for name, ab in factors.items() for letter, x in zip("AB", ab, strict=True))
        return {f"{prefix}{name}.lora_{letter}.{middle}": factor for name, letter, factor in pairs}

    return written


def kohya(prefix: str, path: Callable[[str], str] = flat) -> Callable[[Factors], dict[str, Tensor]]:
    def written(factors: Factors) -> dict[str, Tensor]:
        tensors = {}
        for name, (a, b) in factors.items():
            tensors[f"{prefix}{path(name)}.lora_down.weight"] = a
            tensors[f"{prefix}{path(name)}.lora_up.weight"] = b
        return tensors

    return written


def fused(family: str, state: Factors) -> dict[str, Tensor]:
    """ComfyUI's and ai-toolkit's: q, k and v are one layer, whose A is the three stacked and B block-diagonal; the
    final modulation's shift comes first."""
    rows = FAMILIES[family].rows(FAMILIES[family].layout_of_canonical(state))
    # of two rows of one layer the whole one
    table = {row.names[0]: row for row in sorted(rows, key=lambda row: len(row.names))}
    tensors = {}
    for row in table.values():
        names = row.names
        a, b = state[names[0]]
        if len(names) > 1:
            a, b = torch.cat([state[name][0] for name in names]), torch.block_diag(*(state[name][1] for name in names))
        b = torch.cat([*b.chunk(2)][::-1]) if row.swapped else b
        tensors |= {f"diffusion_model.{row.host}.lora_A.weight": a, f"diffusion_model.{row.host}.lora_B.weight": b}
    return tensors


def old_diffusers(factors: Factors) -> dict[str, Tensor]:
    """Processors' names of the attention: to_q_lora.down."""
    tensors = {}
    for name, (a, b) in factors.items():
        block, _, layer = name.rpartition(".attn")
        number, _, last = layer.partition(".")
        path = f"unet.{block}.attn{number}.processor.{last.removesuffix('.0')}_lora"
        tensors[f"{path}.down.weight"], tensors[f"{path}.up.weight"] = a, b
    return tensors


# -- alphas: rank r of a layer -> what it acts at, and how it is told -----------------------------------------------


def alpha_tensors(value: Callable[[int, int], float], shape: tuple[int, ...] = ()) -> Any:
    """`.alpha` beside the factors of each layer, from its number and its rank."""

    def added(tensors: dict[str, Tensor], factors: Factors) -> tuple[File, dict[str, float]]:
        scales, more = {}, dict(tensors)
        downs = [key for key in tensors if ".lora_down." in key]
        for at, (key, (name, (a, _))) in enumerate(zip(downs, factors.items(), strict=True)):
            alpha = value(at, len(a))
            more[key.replace(".lora_down.weight", ".alpha")] = torch.full(shape, alpha)
            scales[name] = alpha / len(a)
        return (more, {}), scales

    return added


def header(part: str, settings: Callable[[Factors], dict[str, Any]], scale: Callable[[int, int], float]) -> Any:
    """peft's settings in the header."""

    def added(tensors: dict[str, Tensor], factors: Factors) -> tuple[File, dict[str, float]]:
        told = {f"{part}.{name}": value for name, value in settings(factors).items()}
        scales = {name: scale(at, len(a)) for at, (name, (a, _)) in enumerate(factors.items())}
        return (tensors, {"lora_adapter_metadata": json.dumps(told)}), scales

    return added


def none(tensors: dict[str, Tensor], factors: Factors) -> tuple[File, dict[str, float]]:
    return (tensors, {}), dict.fromkeys(factors, 1.0)
