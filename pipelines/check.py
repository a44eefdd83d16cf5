"""Load a LoRA file with the pipeline's own loader and compare what it adds with what we wrote, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ..core.compiled import unwrapped
from ..core.errors import OneStepError
from ..core.families import bind_diffusers, detect
from ..core.lora_file import fit, load_lora
from ..core.tensor_file import read_header, read_tensors
from .injected import load_weights
from .modular import made_of
from .quiet import attempt

Factors = Mapping[str, tuple[Tensor, Tensor]]
ADAPTER = "onestep-check"
TOLERANCE = 1e-6  # of a layer's largest difference: peft may fold alpha in float32


def check_file(pipe: Any, path: Path) -> str:
    """One line that says what was proven. Raises OneStepError where a layer is missing, added or different.

    The file is loaded into a hollow copy of the network, so the pipeline stays as it is.
    """
    network = unwrapped(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)
    targets = bind_diffusers(network)
    ours = fit(load_lora(path, [target.name for target in targets], detect(network)).state, targets)
    worst = compare(ours, _loaded(pipe, network, path), path.name)
    loader = f"diffusers {diffusers.__version__}"
    if not hasattr(pipe, "load_lora_weights"):
        loader = f"peft beside {loader}, which has no loader of LoRAs for this model,"
    return f"{loader} loads all {len(ours)} layers; largest relative difference {worst:.1g}"


def compare(ours: Factors, theirs: Factors, name: str) -> float:
    """The largest relative difference of a layer's change B A. Raises OneStepError where the two are not the same."""
    missing, added = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    if missing or added:
        raise OneStepError(
            f"diffusers {diffusers.__version__} reads {name[:80]} differently: {len(missing)} layers missing, "
            f"{len(added)} added, the first: {(missing + added)[0]}. Please report it with the family of your model."
        )
    worst = max(_difference(ours[layer], theirs[layer]) for layer in ours)
    if not worst <= TOLERANCE:
        raise OneStepError(
            f"diffusers {diffusers.__version__} reads other numbers from {name[:80]}: they differ by {worst:.2g} "
            "of a layer's largest change. Please report it with the family of your model."
        )
    return worst


def _loaded(pipe: Any, network: Any, path: Path) -> Factors:
    """(A, scale B) by module path, as the pipeline's own load_lora_weights puts them into a network."""
    shell = _hollow(network)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    parts = {**dict.fromkeys(pipe.components), "scheduler": pipe.scheduler, name: shell}
    empty = made_of(type(pipe), {**parts, **_flags(pipe)})
    if hasattr(empty, "load_lora_weights"):
        attempt(path, lambda: empty.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=ADAPTER))
    else:
        tensors = read_tensors(path, read_header(path).tensors)
        attempt(path, lambda: load_weights(empty, shell, tensors, ADAPTER))
    return {path: _factors(module) for path, module in shell.named_modules() if hasattr(module, "lora_A")}


def _hollow(network: Any) -> Any:
    """The network's modules on the CPU, each weight a single zero seen in all its places: no memory.

    On the meta device the loader would send the adapters there too, without their numbers.
    """
    with torch.device("meta"):
        shell = type(network).from_config(network.config)
    for module in shell.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
    return shell


def _flags(pipe: Any) -> dict[str, Any]:
    """SD1.5's pipeline warns aloud where it has no safety checker and was not told that none is wanted."""
    return {"requires_safety_checker": False} if "requires_safety_checker" in pipe.config else {}


def _factors(module: Any) -> tuple[Tensor, Tensor]:
    a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
    return a.detach().float(), b.detach().float() * module.scaling[ADAPTER]


def _difference(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """Largest difference of the products B A, relative to the largest entry."""
    if all(torch.equal(mine.flatten(1), other.flatten(1)) for mine, other in zip(ours, theirs, strict=True)):
        return 0.0
    mine, other = (b.flatten(1).double() @ a.flatten(1).double() for a, b in (ours, theirs))
    scale = max(float(mine.abs().max()), torch.finfo(torch.float32).tiny)
    return float((mine - other).abs().max()) / scale
