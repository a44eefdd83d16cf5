"""The tiny models that travel with the package, by name."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import OneStepError

MODELS = ("tiny", "tiny-flow", "tiny-dit")
NAMES = (*MODELS, "judge")


def path_of(name: str) -> Path:
    """The folder of a bundled model. Raises OneStepError where it is not installed."""
    folder = Path(__file__).resolve().parent / "tiny" / name
    if name not in NAMES or not folder.is_dir():
        raise OneStepError(f"the bundled model {name!r} is not at {folder}: install the package again, whole")
    return folder
