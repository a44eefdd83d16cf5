"""What a recipe may hold, and what its fields were called in version 1 of its JSON."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ..errors import OneStepError
from ..families import FAMILIES

PREDICTIONS = ("epsilon", "v_prediction", "sample")
MOST_STEPS = 64
MOST_ENTRIES = 64  # sizes, teacher LoRAs
LONGEST_TEXT = 2000
LONGEST_SIDE = 8192
NOISIEST = 1000.0  # a flow model's last time; an index stays below it
ROUNDING = 1e-9

RANGES = {
    "initial_noise_scale": (1e-3, 10.0),
    "eta": (0.0, 1.0),
    "guidance": (0.0, 100.0),
    "lora_scale": (-10.0, 10.0),
    "shift": (1e-3, 1000.0),
    "time_scale": (1e-3, 1.0),
    "end": (0.0, NOISIEST),
}
VERSION_1 = {"told": "timesteps", "fed": "initial_noise_scale"}
SINCE_2 = ("timesteps", "initial_noise_scale", "sigmas", "files", "time_scale", "end")


def check_recipe(recipe: Any) -> None:
    """Raises OneStepError, with the value found, for a recipe that nothing can be drawn by."""
    _check_times(recipe)
    for name, (low, high) in RANGES.items():
        value = getattr(recipe, name)
        if (value is not None or name != "shift") and not _within(value, low, high):
            raise OneStepError(f"a recipe's {name} is a number in {low:g} to {high:g}, not {value!r:.40}")
    if recipe.end and recipe.end >= recipe.timesteps[-1]:
        raise OneStepError(
            f"a recipe's end lies below its last timestep {recipe.timesteps[-1]:g}, not at {recipe.end:g}"
        )
    if type(recipe.renoise) is not bool:
        raise OneStepError(f"a recipe's renoise is true or false, not {recipe.renoise!r:.40}")
    if recipe.family not in FAMILIES:
        raise OneStepError(f"a recipe is for one of {tuple(FAMILIES)}, not {recipe.family!r:.40}")
    if recipe.prediction is not None and recipe.prediction not in PREDICTIONS:
        raise OneStepError(f"a recipe's prediction is one of {PREDICTIONS} or none, not {recipe.prediction!r:.40}")
    _check_sizes(recipe.sizes)
    _check_texts(recipe)


def _check_times(recipe: Any) -> None:
    times = _entries(recipe, "timesteps", MOST_STEPS)
    if not times:
        raise OneStepError(f"a recipe has 1 to {MOST_STEPS} timesteps, this one has none")
    wrong = [time for time in times if not _within(time, 0.0, NOISIEST * (1 + ROUNDING))]
    if wrong:
        raise OneStepError(f"a recipe's timesteps are numbers in 0 to {NOISIEST:g}, not {wrong[0]!r:.40}")
    if any(later >= earlier for earlier, later in pairwise(times)):
        raise OneStepError(f"a recipe's timesteps fall, noisiest first, not {_in_words(times)[:200]}")
    # lambda rises where sigma falls; None is the end that no number is for
    _check_levels(recipe, "log_snr", (-100.0, 100.0), 1)
    _check_levels(recipe, "sigmas", (0.0, 1e6), -1)


def _check_levels(recipe: Any, name: str, limits: tuple[float, float], sign: int) -> None:
    levels = _entries(recipe, name, MOST_STEPS)
    if levels and len(levels) != len(recipe.timesteps):
        raise OneStepError(f"a recipe of {len(recipe.timesteps)} timesteps has {len(levels)} {name}: give one each")
    known = levels[1:] if levels and levels[0] is None else levels
    wrong = [level for level in known if not _within(level, *limits)]
    if wrong:
        raise OneStepError(f"a recipe's {name} are numbers in {limits[0]:g} to {limits[1]:g}, not {wrong[0]!r:.40}")
    if any(sign * later <= sign * earlier for earlier, later in pairwise(known)):
        raise OneStepError(f"a recipe's {name} go from the noisiest to the cleanest, not {_in_words(known)[:200]}")


def _check_sizes(sizes: Any) -> None:
    pairs = isinstance(sizes, tuple) and len(sizes) <= MOST_ENTRIES
    if not pairs or not all(isinstance(size, tuple) and len(size) == 2 for size in sizes):
        raise OneStepError(f"a recipe's sizes are at most {MOST_ENTRIES} pairs of width and height, not {sizes!r:.80}")
    for side in (side for size in sizes for side in size):
        if type(side) is not int or side % 8 or not 8 <= side <= LONGEST_SIDE:
            raise OneStepError(
                f"a recipe's sizes are whole pixels, multiples of 8 in 8 to {LONGEST_SIDE}, not {side!r:.40}"
            )


def _check_texts(recipe: Any) -> None:
    files = _entries(recipe, "files", MOST_STEPS)
    for text in (recipe.source, *_entries(recipe, "teacher_loras", MOST_ENTRIES), *files):
        if not isinstance(text, str) or len(text) > LONGEST_TEXT:
            raise OneStepError(
                "a recipe's source, teacher_loras and files are texts of at most "
                f"{LONGEST_TEXT} characters, not {text!r:.40}"
            )
    if files and len(files) != len(recipe.timesteps):
        raise OneStepError(f"a recipe of {len(recipe.timesteps)} timesteps names {len(files)} files: give one each")
    for name in files:
        if not name or name in (".", "..") or set(name) & set("/\\:\0"):
            raise OneStepError(f"a recipe's files are names without a folder, not {name!r:.60}: they lie beside it")


def _entries(recipe: Any, name: str, most: int) -> tuple[Any, ...]:
    found: Any = getattr(recipe, name)
    if not isinstance(found, tuple) or len(found) > most:
        raise OneStepError(f"a recipe's {name} are a list of at most {most}, not {found!r:.80}")
    return found


def _within(value: Any, low: float, high: float) -> bool:
    """Whether it is a number in low to high; NaN is in no range."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _in_words(times: tuple[Any, ...]) -> str:
    return ", ".join(f"{time:g}" for time in times)


def version_1(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of version 1 under today's names. It had a noise scale for every step; only the first ever acted."""
    newer = {VERSION_1.get(name, f"{name} in version 1" if name in SINCE_2 else name): values[name] for name in values}
    scales, times = newer.get("initial_noise_scale"), newer.get("timesteps")
    if not isinstance(scales, tuple) or not isinstance(times, tuple) or not 1 <= len(scales) == len(times):
        raise OneStepError(
            f"the LoRA's recipe has no noise scale for each of its times ({scales!r:.60}; {times!r:.60}): "
            "choose a preset by name instead"
        )
    if not all(_within(scale, *RANGES["initial_noise_scale"]) for scale in scales):
        raise OneStepError(f"the LoRA's recipe has the noise scales {scales!r:.80}: choose a preset by name instead")
    return newer | {"initial_noise_scale": scales[0]}
