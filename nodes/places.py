"""Where runs and results lie: every path is made of a checked name under one of ComfyUI's own folders."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import folder_paths

from ..core.errors import OneStepError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,79}")
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}
SUBFOLDER = "onestep"


def checked_name(name: str) -> str:
    """A run's name that is a file name on every system. Raises OneStepError for any other."""
    name = name.strip()
    if not NAME.fullmatch(name) or name.endswith(".") or name.split(".")[0].lower() in RESERVED:
        raise OneStepError(
            f"the name {name[:80]!r} cannot be used: take 1 to 80 letters, digits, spaces, dots, dashes or "
            f"underscores, "
            "a letter or digit first; it becomes a file's name"
        )
    return name


def run_folder(name: str) -> Path:
    """Where the states of the run ``name`` lie."""
    return Path(folder_paths.get_output_directory()) / SUBFOLDER / checked_name(name)


def publish(result: Path, name: str) -> str:
    """Copy a result to models/loras/onestep; the name under which loaders list it."""
    folder = Path(folder_paths.get_folder_paths("loras")[0]) / SUBFOLDER
    place = folder / f"{checked_name(name)}.safetensors"
    beside = place.with_name(f".{place.name}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(result, beside)
        os.replace(beside, place)
    except OSError as error:
        raise OneStepError(
            f"the result could not be copied to {place}: {error.strerror}. It lies in {result}: copy it by hand"
        ) from None
    finally:
        beside.unlink(missing_ok=True)
    return f"{SUBFOLDER}/{place.name}"


def stamp(path: str | Path | None) -> Any:
    """When a file was written and how large it is: by that a node knows that it has changed. None for no file."""
    return path and (Path(path).stat().st_mtime_ns, Path(path).stat().st_size)


def inside_input(path: str) -> Path:
    """A file or folder under ComfyUI's input folder. Raises OneStepError for one outside it, or that is not there."""
    root = Path(folder_paths.get_input_directory()).resolve()
    try:
        found = (root / path.strip()).resolve()
    except (OSError, ValueError, RuntimeError):
        found = root.parent
    if not found.is_relative_to(root):
        raise OneStepError(
            f"{path[:120]!r} lies outside ComfyUI's input folder: put the file into {root} and give its name"
        )
    if not found.exists():
        raise OneStepError(f"{path[:120]!r} is not in ComfyUI's input folder {root}: check the name")
    return found
