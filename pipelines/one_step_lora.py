"""A few-step LoRA's file on a pipeline of diffusers: read once, by our reader, and handed over as it was read."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.errors import OneStepError
from ..core.families import FAMILIES, bind_diffusers, detect
from ..core.lora_file import LoraFile, State, fit, load_lora, of_one_rank
from ..core.recipe import Recipe, recipe_of, step_files
from ..core.recipe.presets import preset_names
from ..core.recipe.recognised import of_second_order, recognised
from ..core.router import Router, is_router, load_students
from ..core.targets import Target, is_adaptable
from .adapt import network_of
from .check import compare
from .injected import load_weights
from .injected import take_off as drop
from .quiet import attempt

INSIDE = re.compile(r"\.(base_layer|lora_\w+)(\.|$)")
"""Of a module's path: what peft has put into a layer that it adapts."""


def load_lora_into(
    pipe: Any, path: Path, recipe: Recipe | str | None, adapter_name: str, former: Sequence[str] = ()
) -> tuple[Recipe, float | None, tuple[str, ...], Router | None]:
    """Load a file into a family's own pipeline, and those of its other steps where each step has one, or the students
    of a router's; its recipe, the embedded guidance that it was trained at, the names of the adapters, of which the
    first acts, and the router.

    Every layer of a file acts at its own alpha / rank, or OneStepError is raised. What was active stays so;
    ``former`` and an adapter of the same name are taken off. Text encoders' keys are left out, with a warning.
    """
    network = network_of(pipe)
    family, targets = detect(network), base_targets(network)
    students = load_students(path) if is_router(path) else None
    path = path if students is None else students.files[0]
    file = load_lora(path, [target.name for target in targets], family)
    found = recipe_of(recipe if recipe is not None else file.recipe or _by_names(path, file))
    check_family(found, network)
    paths = step_files(path, found) if students is None else students.files
    files = [load_lora(each, [target.name for target in targets], family) for each in paths]
    names = (adapter_name, *(f"{adapter_name}-{step}" for step in range(2, len(files) + 1)))
    take_off(pipe, {*names, *former})
    active = _active(network)
    try:
        for name, one in zip(names, files, strict=True):
            _load(pipe, path, fit(one.state, targets), family, name, found.lora_scale)
    except OneStepError:
        take_off(pipe, set(names))
        raise
    finally:
        _activate(network, active, adapter_name)
    file.say_left_out(path)
    return found, _trained_at(file.metadata), names, None if students is None else students.router


def _by_names(path: Path, file: LoraFile) -> Recipe:
    """What the names of a file without a recipe stand for, which is said."""
    say = "give its recipe, load_one_step_lora(path, recipe=...)"
    found = recognised(path, file.metadata, file.family, say)
    if found is None:
        names = preset_names(file.family)
        if said := of_second_order(path, file.metadata):
            raise OneStepError(said)
        raise OneStepError(f"{path.name[:80]} has no recipe in its header: {say}, one of {names}")
    logging.warning("OneStep: %s is %s; recipe=... says otherwise", path.name[:80], found)
    return found.recipe


def _load(pipe: Any, path: Path, state: State, family: str, name: str, scale: float) -> None:
    """One file's factors as the adapter ``name``, compared with what was read."""
    network = network_of(pipe)
    attempt(path, lambda: load_weights(pipe, network, _in_pefts_names(state, family), name))
    compare(*_as_loaded(state, network, name), path.name)
    for layer in adapted(network, name).values():
        layer.set_scale(name, scale)


def act_alone(network: Any, names: Sequence[str], step: int) -> None:
    """Of the adapters ``names`` the one of ``step`` acts, beside what else does."""
    others = {path: [name for name in acting if name not in names] for path, acting in _active(network).items()}
    _activate(network, others, names[step])


def base_targets(network: Any) -> list[Target]:
    """The network's targets, also where peft has attached LoRAs to some of its layers."""
    if not any(hasattr(module, "base_layer") for module in network.modules()):
        return bind_diffusers(network)
    family = FAMILIES[detect(network)]
    own = {path: module for path, module in network.named_modules() if not INSIDE.search(path)}
    layers: dict[str, nn.Module] = {path: getattr(module, "base_layer", module) for path, module in own.items()}
    layers = {path: module for path, module in layers.items() if is_adaptable(module)}
    known = family.canonical_names(family.layout_of_canonical(layers))
    return [Target(path, module) for path, module in layers.items() if path in known]


def adapted(network: Any, adapter_name: str) -> dict[str, Any]:
    """The layers, by their path, that a LoRA of this name is on."""
    return {path: layer for path, layer in network.named_modules() if adapter_name in getattr(layer, "lora_A", {})}


def take_off(pipe: Any, names: set[Any]) -> None:
    """Drop the LoRAs of these names, wherever they are on."""
    network = network_of(pipe)
    for name in names:
        if adapted(network, name):
            drop(pipe, network, name)


def keep_on(network: Any, adapter_name: str | None) -> None:
    """The LoRA of this name acts beside what is active: a LoRA that is loaded after it switches it off."""
    layers = {} if adapter_name is None else adapted(network, adapter_name)
    silent = [layer for layer in layers.values() if layer.disable_adapters or adapter_name not in layer.active_adapters]
    if silent and adapter_name is not None:
        _activate(network, _active(network), adapter_name)
        logging.warning(
            "OneStep: the one-step LoRA %r was switched off when another was loaded: it is on again beside it; "
            "unload_lora_weights() takes both off",
            adapter_name,
        )


def check_family(recipe: Recipe, network: Any) -> None:
    family = detect(network)
    if recipe.family != family:
        raise OneStepError(f"the recipe is for the family {recipe.family!r}, this model is {family!r}: choose another")


def _in_pefts_names(state: State, family: str) -> dict[str, Tensor]:
    """What diffusers reads without converting anything; one rank, as its older versions take one alpha for all."""
    part = FAMILIES[family].part
    filled = of_one_rank(state)
    return {
        f"{part}.{name}.lora_{letter}.weight": factor
        for name, factors in filled.items()
        for letter, factor in zip("AB", factors, strict=True)
    }


def _as_loaded(state: State, network: Any, adapter_name: str) -> tuple[State, State]:
    """(A, B) as they were read, in the dtype that the network holds them in, and (A, scale B) as they lie there."""
    ours, theirs, filled = {}, {}, of_one_rank(state)
    for path, layer in adapted(network, adapter_name).items():
        a, b = (getattr(layer, part)[adapter_name].weight.detach() for part in ("lora_A", "lora_B"))
        theirs[path] = a.cpu().float(), b.cpu().float() * layer.scaling[adapter_name]
        if path in filled:
            ours[path] = filled[path][0].to(a.dtype).float(), filled[path][1].to(b.dtype).float()
    return {**filled, **ours}, theirs


def _active(network: Any) -> dict[str, list[str]]:
    """The LoRAs that act, by layer."""
    layers = {path: layer for path, layer in network.named_modules() if hasattr(layer, "active_adapters")}
    return {
        path: [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.scaling]
        for path, layer in layers.items()
        if hasattr(layer, "scaling")
    }


def _activate(network: Any, active: Mapping[str, list[str]], adapter_name: str) -> None:
    """Let act, in each layer, what acted before and this one, at the scales that they have."""
    for path, layer in network.named_modules():
        if hasattr(layer, "scaling") and hasattr(layer, "set_adapter"):
            own = [adapter_name] if adapter_name in layer.scaling else []
            names = [name for name in active.get(path, []) if name in layer.scaling and name != adapter_name]
            if layer.disable_adapters:
                layer.enable_adapters(True)
            layer.set_adapter([*names, *own])
            for part in (layer.lora_A, layer.lora_B):
                part.requires_grad_(False)  # set_adapter readies what it lets act for training


def _trained_at(metadata: Mapping[str, str]) -> float | None:
    """The guidance in the settings of our own file's run; None for others' files."""
    try:
        told = json.loads(metadata.get("onestep.settings", "{}"))
        guidance = told.get("guidance") if isinstance(told, dict) else None
    except (ValueError, RecursionError):
        guidance = math.nan
    if guidance is None:
        return None
    plain = isinstance(guidance, int | float) and not isinstance(guidance, bool)
    if not plain or not 0 <= guidance <= 100:
        raise OneStepError(
            f"the file's settings (onestep.settings) name the guidance {guidance!r:.40}, which is no number from 0 to "
            "100: the file is damaged, download or export it again"
        )
    return float(guidance)
