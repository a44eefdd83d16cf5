"""A LoRA file with the way to sample it, checked against the model it is for."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.adapter_file import load_adapter, read_told
from ..core.errors import OneStepError
from ..core.factors import State
from ..core.guidance_adapter import MAKERS, check_base
from ..core.lora_file import LoraFile, fit, load_lora
from ..core.recipe import PRESETS, Recipe, step_files
from ..core.recipe.presets import preset_names
from ..core.recipe.recognised import recognised
from ..core.router import Router, is_router, load_students
from ..training.settings import nearest


@dataclass(frozen=True)
class Lora:
    """name: the file's. state: factors by target name. settings: what it was trained with; {} where it is silent.
    module: a guidance adapter, in place of factors. later: factors of the later steps, where each has a file; or of the
    other students of a router, whose ``files`` are then named."""

    name: str
    state: State
    recipe: Recipe
    settings: dict[str, Any]
    module: Any = None
    later: tuple[State, ...] = ()
    router: Router | None = None
    files: tuple[str, ...] = ()

    @property
    def parts(self) -> Router | tuple[float, ...]:
        """By what it is chosen which of several serves."""
        return self.router or self.recipe.timesteps


def read_lora(file: str, host: Any, recipe: str | None = None) -> Lora:
    """The LoRA of ``file`` for ``host``. Raises OneStepError where it is another model's or lacks a recipe."""
    targets = list(host.denoiser.roles.targets.values())
    names = [target.name for target in targets]
    students = load_students(Path(file)) if is_router(Path(file)) else None
    file = file if students is None else str(students.files[0])
    loaded = load_lora(file, names, host.family)
    loaded.say_left_out(file)
    chosen = preset_recipe(recipe, host) if recipe is not None else own_recipe(loaded.recipe, file, loaded)
    if chosen.family != host.family:
        raise OneStepError(
            f"the recipe is for {chosen.family!r} models, {host.name} is {host.family!r}: choose another --recipe"
        )
    files = step_files(Path(file), chosen) if students is None else students.files
    first, *later = [fit(load_lora(path, names, host.family).state, targets) for path in files]
    found = Lora(Path(file).name, first, chosen, settings_in(loaded.metadata), later=tuple(later))
    if students is None:
        return found
    return replace(found, router=students.router, files=tuple(path.name for path in students.files))


def read_student(file: str, host: Any) -> Lora:
    """The LoRA or the guidance adapter of ``file`` for ``host``. Raises OneStepError where it is another model's."""
    if read_told(file) is None:
        return read_lora(file, host)
    found = load_adapter(file, MAKERS, host.family)
    check_base(found.module, host.denoiser.roles.targets, host.family)
    recipe = own_recipe(found.metadata.get("onestep.recipe"), file)
    return Lora(Path(file).name, {}, recipe, settings_in(found.metadata), found.module)


def own_recipe(text: str | None, file: str, lora: LoraFile | None = None) -> Recipe:
    """What a file's header says; of a LoRA that says nothing, what its names stand for, with a word."""
    if text is not None:
        return Recipe.from_json(text)
    path, say = Path(file), "add --recipe NAME"
    found = recognised(path, lora.metadata, lora.family, say) if lora else None
    if found is None:
        names = preset_names(lora.family if lora else None)
        raise OneStepError(f"{path.name[:100]} does not say how it is sampled: {say}, one of {names}")
    logging.warning("OneStep: %s is %s; --recipe says otherwise", path.name[:100], found)
    return found.recipe


def preset_recipe(name: str, host: Any) -> Recipe:
    if name not in PRESETS:
        raise OneStepError(f"no recipe {name[:60]!r}{nearest(name, PRESETS)}")
    return PRESETS[name]


def settings_in(metadata: dict[str, str]) -> dict[str, Any]:
    """The run's settings that our files hold; {} for others'."""
    try:
        told = json.loads(metadata.get("onestep.settings", "{}"))
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def in_steps(recipe: Recipe, host: Any, steps: int | None) -> Recipe:
    """``recipe``, or the plain one of another number of steps that begins at the same level."""
    if steps is None or steps == recipe.steps:
        return recipe
    if not 1 <= steps <= 64:
        raise OneStepError(f"--steps is {steps}: a LoRA draws in 1 to 64 steps")
    schedule = host.denoiser.schedule
    first = recipe.levels(schedule)[0]
    start = min(1.0, float(schedule.share_of(first)))
    plain = Recipe.for_student(schedule, steps, recipe.family, recipe.sizes, start)
    kept: dict[str, Any] = {
        "guidance": recipe.guidance,
        "lora_scale": recipe.lora_scale,
        "prediction": recipe.prediction,
        "time_scale": recipe.time_scale,
    }
    return replace(plain, initial_noise_scale=recipe.noise_scale_from(schedule, first), **kept)
