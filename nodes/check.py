"""Load a LoRA file with ComfyUI's own loader and compare what it would add to each weight with what we wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.utils
import comfyui_version
import torch
from torch import Tensor

from ..core.errors import OneStepError
from ..core.lora_file import fit, load_lora
from ..core.lora_keys import parse
from ..core.targets import Target, out_features
from ..core.tensor_file import read_header

TOLERANCE = 1e-5  # of a layer's largest change: ComfyUI multiplies in float32


def check_file(model: Any, targets: Sequence[Target], family: str, path: Path) -> str:
    """One line that says what was proven. Raises OneStepError where a layer is missing, added or different."""
    ours = fit(load_lora(path, [target.name for target in targets], family).state, targets)
    theirs = loaded(model, path)
    held = sum(parse(key)[1] == "a" for key in read_header(path).tensors)
    if sum(map(len, theirs.values())) != held:
        raise OneStepError(
            f"ComfyUI loads {sum(map(len, theirs.values()))} of the {held} layers in {path.name[:80]}: "
            "please report it with the name of your model"
        )
    keys = {module: f"diffusion_model.{name}.weight" for name, module in model.diffusion_model.named_modules()}
    layers: dict[str, list[Target]] = {}
    for target in targets:
        if target.name in ours:
            layers.setdefault(keys[target.module], []).append(target)
    worst = max(_difference(here, ours, key, theirs.get(key, [])) for key, here in layers.items())
    if worst > TOLERANCE:
        raise OneStepError(
            f"ComfyUI reads other numbers from {path.name[:80]}: they differ by {worst:.2g} of a layer's "
            f"largest change. "
            "Please report it with the name of your model"
        )
    version = comfyui_version.__version__
    return f"ComfyUI {version} loads all {len(ours)} layers; largest relative difference {worst:.1g}"


def loaded(model: Any, path: Path) -> dict[str, list[Any]]:
    """ComfyUI's patches of each weight, as LoraLoader makes them."""
    file = comfy.utils.load_torch_file(str(path), safe_load=True)
    names = comfy.lora.model_lora_keys_unet(model, {})
    patches: dict[str, list[Any]] = {}
    for key, adapter in comfy.lora.load_lora(file, names, log_missing=False).items():
        weight, offset, function = (*key, None)[:3] if isinstance(key, tuple) else (key, None, None)
        patches.setdefault(weight, []).append((1.0, adapter, 1.0, offset, function))
    return patches


@torch.no_grad()
def _difference(here: list[Target], ours: Any, key: str, patches: list[Any]) -> float:
    """Largest difference of the changes of one layer's weight, relative to the largest change."""
    shape = (out_features(here[0].module), *here[0].shape_a(1)[1:])
    expected = torch.zeros(shape)
    for target in here:
        start, stop = target.row_range
        expected[start:stop] = target.host_order(_product(*ours[target.name])).reshape(expected[start:stop].shape)
    given = comfy.lora.calculate_weight(patches, torch.zeros(shape), key)
    scale = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    return float((given - expected).abs().max()) / scale


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (b.flatten(1).double() @ a.flatten(1).double()).float()
