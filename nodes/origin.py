"""Where a MODEL came from: its checkpoint's name and file, and what is plugged into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.licences import BASE, BASE_LORA, Part


def name_of(model: Any) -> str:
    """The checkpoint's file name, where the loader left it."""
    path = file_of(model)
    return path.stem if path else type(model.model).__name__


def file_of(model: Any) -> Path | None:
    """The checkpoint's file, where the loader left it."""
    told = (model.cached_patcher_init or ((), ()))[1]
    return next((Path(value) for value in told if isinstance(value, str | Path)), None)


def made_of(model: Any) -> list[Part]:
    """The checkpoint, and whatever LoRAs are plugged into it, which do not say their names."""
    path = file_of(model)
    merged = [(BASE_LORA, "plugged into the model", None)] if model.patches else []
    return [(BASE, path.name if path else name_of(model), path), *merged]
