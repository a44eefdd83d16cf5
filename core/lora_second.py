"""The second LoRA file of a family that no one file serves in both hosts: beside the first, for the other host."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from .errors import OneStepError
from .families import FAMILIES
from .lora_file import load_lora, save_lora
from .lora_fused import Host
from .tensor_file import read_header

OTHER: Mapping[Host, Host] = {"comfyui": "diffusers", "diffusers": "comfyui"}
TITLES: Mapping[Host, str] = {"comfyui": "ComfyUI", "diffusers": "diffusers"}


def second_file(path: Path, family: str, host: Host) -> Path | None:
    """Where the file for the other host lies beside ``path``, which is ``host``'s: a.safetensors and
    a_diffusers.safetensors, or a_comfyui.safetensors. None where one serves both."""
    if FAMILIES[family].dialect != "each":
        return None
    return path.with_name(f"{path.stem}_{OTHER[host]}{path.suffix}")


def file_for(path: Path, family: str, host: Host) -> Path:
    """Of the two files of which ``path`` is one, that for ``host``; ``path`` where one serves both."""
    if FAMILIES[family].dialect != "each":
        return path
    own: Host = "diffusers" if any(key.startswith("transformer.") for key in read_header(path).tensors) else "comfyui"
    if own == host:
        return path
    ending = f"_{own}"
    found = path.stem.removesuffix(ending) if path.stem.endswith(ending) else f"{path.stem}_{host}"
    return path.with_name(f"{found}{path.suffix}")


def save_second(
    first: Path,
    second: Path,
    state: Mapping[str, tuple[Tensor, Tensor]],
    family: str,
    recipe: str | None,
    metadata: Mapping[str, str],
    host: Host,
) -> str:
    """Write to ``second``, for the other host, what ``first`` holds for ``host``, and read both back; what was proven,
    in words. The rest as in `save_lora`."""
    save_lora(second, state, family, recipe, metadata, OTHER[host])
    one, other = (load_lora(file, family=family).state for file in (first, second))
    names = sorted(one)
    pairs = (zip(one[name], other[name], strict=True) for name in names if name in other)
    if names != sorted(other) or not all(torch.equal(mine, theirs) for mine, theirs in chain.from_iterable(pairs)):
        raise OneStepError(f"{second.name[:80]} holds other numbers than {first.name[:80]}: please report it")
    return (
        f"{first.name} is for {TITLES[host]}; {second.name} is the same {len(other)} layers for {TITLES[OTHER[host]]}, "
        "which is not here: by its map alone. OneStep reads either"
    )
