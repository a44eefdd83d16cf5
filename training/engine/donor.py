"""The initial LoRA of a run: somebody's few-step LoRA, or a student of ours, whose factors and recipe it takes over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ...core.denoiser import EpsDenoiser
from ...core.errors import OneStepError
from ...core.factors import truncated
from ...core.lora_file import fit, load_lora
from ...core.recipe import PRESETS, Recipe
from ...core.recipe.by_name import preset_by_name
from ...core.roles import State
from ...core.tensor_file import read_header
from ..host import Host
from ..settings import Settings, nearest

AUTO, OWN = "auto", "own"
"""The setting `initial_recipe`: as the file says, or its name; as the run says, whatever its initial LoRA says."""


Initial = tuple[State | None, str]
"""An initial LoRA's factors, and what a run tells of them."""


def initial_state(host: Host, settings: Settings) -> Initial:
    """The initial LoRA's factors at the run's rank, in every target, and what was lost of them, in words: filled up
    with zeros where it has less, cut where it has more."""
    if not settings.initial_lora:
        return None, ""
    targets = list(host.denoiser.roles.targets.values())
    file = load_lora(settings.initial_lora, [target.name for target in targets], host.family)
    file.say_left_out(settings.initial_lora)
    recipe = donor_recipe(host, settings)
    scale = 1.0 if recipe is None else recipe.lora_scale
    state = {name: (a, scale * b) for name, (a, b) in fit(file.state, targets).items()}
    notes = [donor_note(recipe, settings)]
    largest = max(len(a) for a, _ in state.values())
    if largest > settings.rank:
        state, kept = cut(state, settings.rank)
        notes.append(f"the initial LoRA of rank {largest} is cut to {settings.rank}, which keeps {kept:.1%} of it")
    host.denoiser.roles.add("initial", settings.rank, settings.seed)
    grown = host.denoiser.roles.state("initial")
    for name, (a, b) in state.items():
        grown[name][0][: len(a)] = a
        grown[name][1][:, : len(a)] = b
    host.denoiser.roles.drop("initial")
    return grown, "; ".join(note for note in notes if note)


def cut(state: State, rank: int) -> tuple[State, float]:
    """Factors of ``rank`` at most, and the share of the squared size of all products that they keep."""
    found: State = {}
    whole = left = 0.0
    for name, (a, b) in state.items():
        found[name], s = truncated(a, b, rank)
        whole, left = whole + _size(s), left + _size(s[rank:])
    return found, 1 - left / whole if whole else 1.0


def _size(values: Tensor) -> float:
    return float(values.square().sum())


def donor_recipe(host: Host, settings: Settings) -> Recipe | None:
    """How the initial LoRA is sampled: by `initial_recipe`, else by its header, else by its file's name. None without
    one, where the run's own steps are asked for, and where nothing says so.

    Raises OneStepError for a recipe that does not fit the base, or that needs guidance.
    """
    if not settings.initial_lora or settings.initial_recipe == OWN:
        return None
    path, name = settings.initial_lora, "" if settings.initial_recipe == AUTO else settings.initial_recipe
    told = read_header(path).metadata.get("onestep.recipe")
    if name or not told:
        name = name or preset_by_name(Path(path).name) or ""
        if not name:
            return None
        if name not in PRESETS:
            raise OneStepError(f"initial_recipe is {name!r:.60}{nearest(name, (AUTO, OWN, *PRESETS))}")
        recipe = PRESETS[name]
        if recipe.family == "unet" and not isinstance(host.denoiser, EpsDenoiser):
            raise OneStepError(
                f"{name} was made for models that predict noise, and {host.name} does not: take a LoRA of its own kind"
            )
    else:
        recipe = Recipe.from_json(told)
    if recipe.family != host.family:
        raise OneStepError(f"the initial LoRA is of {recipe.family!r} models, and {host.name} is {host.family!r}")
    if recipe.guidance != 1:
        raise OneStepError(
            f"the initial LoRA is sampled with guidance {recipe.guidance:g}, two forwards a step: give one that draws "
            f"without, or initial_recipe={OWN}"
        )
    return recipe


def student_of_donor(host: Host, settings: Settings) -> Recipe | None:
    """The recipe of a student that goes on from the initial LoRA: its steps, its times, its noise; at this run's
    sizes, and at full strength, which its factors have taken in."""
    recipe = donor_recipe(host, settings)
    return None if recipe is None else replace(recipe, sizes=settings.size_list, lora_scale=1.0, source="")


def donor_note(recipe: Recipe | None, settings: Settings) -> str:
    """What a run tells of the recipe that it takes over, where that is not what its settings say."""
    if recipe is None or recipe.steps == settings.student_steps:
        return ""
    return f"the initial LoRA draws in {recipe.steps} steps, and so does the student (initial_recipe={OWN}: in its own)"
