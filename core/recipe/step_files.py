"""A LoRA for each step: how its files are called, and where they are found."""

from __future__ import annotations

from pathlib import Path

from ..errors import OneStepError
from .definition import Recipe


def step_names(name: str, steps: int) -> tuple[str, ...]:
    """The files of ``steps`` steps, by the first one's name: a.safetensors, a-2.safetensors, ..."""
    first = Path(name)
    return (name, *(f"{first.stem}-{step}{first.suffix}" for step in range(2, steps + 1)))


def step_files(path: Path, recipe: Recipe) -> list[Path]:
    """The file of each step of a recipe that one of them holds; ``path`` alone where it serves all.

    They lie beside each other, under their own names or renamed together. Raises OneStepError where one is missing.
    """
    if len(set(recipe.files)) < 2:
        return [path]
    names = recipe.files
    if path.name not in names:
        ends = [Path(name).stem.removeprefix(Path(names[0]).stem) for name in names]
        names = tuple(f"{path.stem}{end}{path.suffix}" for end in ends)
    found = [path.with_name(name) for name in names]
    missing = [file.name for file in found if not file.is_file()]
    if missing:
        raise OneStepError(
            f"{path.name[:80]} is one of {len(found)} files, each for a step of its own, and {missing[0][:80]} is not "
            "beside it: put them all into one folder, named as the run has named them, and choose the first"
        )
    return found
