"""The initial LoRA of a run: somebody's few-step LoRA, or a student of ours, whose factors and recipe it takes over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ...core.denoiser import EpsDenoiser, VDenoiser, X0Denoiser
from ...core.errors import OneStepError
from ...core.factors import truncated
from ...core.families import FAMILIES
from ...core.lora_file import AnotherBase, LoraFile, fit, load_lora
from ...core.recipe import PRESETS, Recipe
from ...core.recipe.recognised import Recognised, recognised
from ...core.roles import State
from ...core.targets import Target
from ...core.tensor_file import read_header
from ..host import Host
from ..settings import Settings, nearest

AUTO, OWN = "auto", "own"
"""The setting `initial_recipe`: as the file says, or its name; as the run says, whatever its initial LoRA says."""


Initial = tuple[State | None, str]
"""An initial LoRA's factors, and what a run tells of them."""


def initial_state(host: Host, settings: Settings, drawn: Callable[[Host, Settings], Recipe] | None = None) -> Initial:
    """The initial LoRA's factors at the run's rank, in every target, and what was lost of them, in words: filled up
    with zeros where it has less, cut where it has more. drawn: how the student does, if not as it."""
    if not settings.initial_lora:
        return None, ""
    targets, recipe = list(host.denoiser.roles.targets.values()), donor_recipe(host, settings)
    file, fitted = read_initial(host.family, targets, settings)
    _check_prediction(host, file)
    scale = 1.0 if recipe is None else recipe.lora_scale
    state = {name: (a, scale * b) for name, (a, b) in fitted.items()}
    if not any(bool(a.any()) and bool(b.any()) for a, b in state.values()):
        raise OneStepError(
            f"the initial LoRA changes nothing: its factors are 0{' at its strength' * (scale != 1)}. Give another one"
        )
    takes_over = drawn is None or (recipe is not None and drawn(host, settings).timesteps == recipe.timesteps)
    notes = [_taken(settings, host.family), _note(recipe, settings) if takes_over else ""]
    notes += [file.said and f"of the initial LoRA {file.said}"]
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


def read_initial(family: str, targets: Sequence[Target], settings: Settings) -> tuple[LoraFile, State]:
    """The initial LoRA, and its factors in the shapes of ``targets``. Raises OneStepError for one of another model."""
    try:
        file = load_lora(settings.initial_lora, [target.name for target in targets], family)
        return file, fit(file.state, targets)
    except AnotherBase as error:
        if settings.targets == "all":
            raise
        raise OneStepError(f"{error} Or set targets=all: this run adapts {settings.targets} alone") from None


PREDICTIONS = {"epsilon": EpsDenoiser, "v": VDenoiser}
"""What a network predicts, in modelspec's words."""
MARKS = ("v_pred", "ztsnr")


def predicts(host: Host) -> str:
    """What ``host``'s network predicts, in modelspec's words; "" where they have none for it."""
    return next((name for name, kind in PREDICTIONS.items() if isinstance(host.denoiser, kind)), "")


def _check_prediction(host: Host, file: LoraFile) -> None:
    """Raises OneStepError where the file says that it is for networks that predict something else."""
    marked = any(key.endswith(MARKS) for key in file.unused)
    told, found = "v" if marked else file.metadata.get("modelspec.prediction_type", ""), predicts(host)
    if told in PREDICTIONS and found and told != found:
        raise OneStepError(
            f"the initial LoRA is for models that predict {told}, and {host.name} predicts {found}: take one of its "
            "own kind"
        )


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
    """How the initial LoRA is sampled: by `initial_recipe`, else by its header, else by what its names stand for. None
    without one, where the run's own steps are asked for, and where nothing says so.

    Raises OneStepError for names that stand for several, a recipe that does not fit the base, or one that needs
    guidance.
    """
    _check_named(settings)
    if not settings.initial_lora or settings.initial_recipe == OWN:
        return None
    name = "" if settings.initial_recipe == AUTO else settings.initial_recipe
    told = read_header(settings.initial_lora).metadata.get("onestep.recipe")
    if name or not told:
        guessed = None if name else _recognised(settings, host.family)
        if not name and guessed is None:
            return None
        name = guessed.preset if guessed else name
        recipe = PRESETS[name]
        if recipe.family == host.family and FAMILIES[host.family].unet and not isinstance(host.denoiser, EpsDenoiser):
            raise OneStepError(
                f"{name} was made for models that predict noise, and {host.name} does not: take a LoRA of its own kind"
            )
    else:
        recipe = _of_one_file(Recipe.from_json(told))
    _check_fits(recipe, host)
    return recipe


def _check_fits(recipe: Recipe, host: Host) -> None:
    """Raises OneStepError where no student of this base can draw as the initial LoRA does."""
    if recipe.prediction == "sample" and not isinstance(host.denoiser, X0Denoiser):
        raise OneStepError(
            "the initial LoRA makes its network answer with the picture itself, as SDXL-Lightning's one step does, "
            f"and {host.name} does not: give one of 2, 4 or 8 steps, or initial_recipe={OWN}"
        )
    if recipe.time_scale != 1:
        raise OneStepError(
            f"the initial LoRA makes its network expect {recipe.time_scale:g} of each time, and {host.name} is given "
            f"all of it: give another one, or initial_recipe={OWN}"
        )
    if recipe.family != host.family:
        raise OneStepError(
            f"the initial LoRA is a LoRA for {FAMILIES[recipe.family].title}, and {host.name} is "
            f"{FAMILIES[host.family].title}: choose a LoRA of this base"
        )
    if recipe.guidance != 1:
        raise OneStepError(
            f"the initial LoRA is sampled with guidance {recipe.guidance:g}, two forwards a step: give one that draws "
            f"without, or initial_recipe={OWN}"
        )


def _check_named(settings: Settings) -> None:
    name = settings.initial_recipe
    if name not in (AUTO, OWN, *PRESETS):
        raise OneStepError(f"initial_recipe is {name!r:.60}{nearest(name, (AUTO, OWN, *PRESETS))}")
    if name in PRESETS and not settings.initial_lora:
        raise OneStepError(
            f"initial_recipe is {name}, but there is no initial LoRA that it could be of: give initial_lora, or set "
            f"initial_recipe={AUTO}"
        )


def _recognised(settings: Settings, family: str) -> Recognised | None:
    """What the initial LoRA's names stand for, in this family; other families' files have like names."""
    path = Path(settings.initial_lora)
    how = f"name it in initial_recipe, or set initial_recipe={OWN} for the run's own steps"
    return recognised(path, read_header(path).metadata, family, how)


def _taken(settings: Settings, family: str) -> str:
    """What a run tells of an initial LoRA that does not say itself how it is sampled; "" of one that does."""
    if settings.initial_recipe != AUTO or "onestep.recipe" in read_header(settings.initial_lora).metadata:
        return ""
    found = _recognised(settings, family)
    return f"the initial LoRA is {found} (initial_recipe says otherwise)" if found else ""


def _of_one_file(recipe: Recipe) -> Recipe:
    """Raises OneStepError where each step has a file of its own."""
    if len(set(recipe.files)) > 1:
        raise OneStepError(
            f"the initial LoRA is one of {len(recipe.files)}, each for a step of its own: give one that serves all "
            f"steps, or initial_recipe={OWN}, and this one alone is begun with"
        )
    return recipe


def student_of_donor(host: Host, settings: Settings) -> Recipe | None:
    """The recipe of a student that goes on from the initial LoRA: its steps, its times, its noise; at this run's
    sizes, and at full strength, which its factors have taken in. Where an expert's ends, the run's noise_range says."""
    recipe = donor_recipe(host, settings)
    return None if recipe is None else replace(recipe, sizes=settings.size_list, lora_scale=1.0, source="", end=0.0)


def _note(recipe: Recipe | None, settings: Settings) -> str:
    """What a run tells of the recipe that it takes over, where that is not what its settings say."""
    if recipe is None or recipe.steps == settings.student_steps:
        return ""
    return f"the initial LoRA draws in {recipe.steps} steps, and so does the student (initial_recipe={OWN}: in its own)"
