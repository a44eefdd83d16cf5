"""Where runs and results lie: every path is made of a checked name under one of ComfyUI's own folders."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import folder_paths

from ..core.errors import OneStepError
from ..core.lora_second import second_file
from ..core.recipe import Recipe
from ..core.router import run_files

SUBFOLDER = "onestep"
LORAS, ADAPTERS = "loras", "onestep_adapters"
"""Kinds of folders as ComfyUI knows them. Adapters that are no LoRAs have one of their own: no LoRA list shows them."""
SUFFIX = ".safetensors"
NONE_YET = "none yet"
PICTURES = ("pictures", "real_pictures")
"""Settings that are a folder of pictures."""
PACK = Path(__file__).resolve().parents[1]
FORBIDDEN = set('<>:"|?*')
JOINERS = "\u200c\u200d"
"""Between letters of Persian and of India's scripts; all other characters without a shape are refused."""
RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$", "clock$"}
RESERVED |= {f"{port}{number}" for port in ("com", "lpt") for number in range(10)}
MOST_CHARACTERS, MOST_BYTES, MOST_PARTS = 120, 200, 6


def add_folders() -> None:
    """Tell ComfyUI of the adapters' folder, models/onestep, and of the LoRA that comes with the pack."""
    folder_paths.add_model_folder_path(ADAPTERS, os.path.join(folder_paths.models_dir, SUBFOLDER), is_default=True)
    folder_paths.folder_names_and_paths[ADAPTERS][1].add(SUFFIX)
    folder_paths.add_model_folder_path(LORAS, str(PACK / "pipelines" / "tiny" / "loras"))


add_folders()


# -- names ------------------------------------------------------------------------------------------------------------


def checked_name(name: str) -> str:
    """A run's name, of any script, maybe in subfolders (``people/anna``), that is a file name on every system.

    Raises OneStepError for any other.
    """
    whole = unicodedata.normalize("NFC", name.strip().replace("\\", "/"))
    parts = whole.split("/")
    fault = next(filter(None, map(_fault, parts)), "")
    if not fault and (len(whole) > MOST_CHARACTERS or len(parts) > MOST_PARTS):
        fault = f"it has {len(whole)} characters in {len(parts)} parts, {MOST_CHARACTERS} in {MOST_PARTS} are the most"
    if fault:
        raise OneStepError(
            f"the name {name[:80]!r} cannot be used: {fault}. It becomes a file's name; take letters of any script, "
            "digits, spaces, dots, dashes or underscores, and / for a subfolder"
        )
    return whole


def _fault(part: str) -> str:
    """What keeps a part of a name from being a file's name on every system; nothing where it is one."""
    if not part.strip(" ."):
        return f"{part[:40]!r} is no name of a file or folder" if part else "a part of it is empty"
    if part[0] in " .-" or part[-1] in " .":
        return f"{part[:40]!r} begins with a space, dot or dash, or ends with a space or dot"
    strange = [c for c in part if c in FORBIDDEN or (unicodedata.category(c)[0] in "CZ" and c not in " " + JOINERS)]
    if strange:
        return f"{strange[0]!r} may not stand in a file's name"
    if len(part.encode()) > MOST_BYTES:
        return f"{part[:20]!r}... takes {len(part.encode())} bytes, {MOST_BYTES} are the most"
    stem = unicodedata.normalize("NFKC", part).split(".")[0].strip().lower()
    return f"Windows keeps the name {stem!r} for itself" if stem in RESERVED else ""


def run_folder(name: str) -> Path:
    """Where the states of the run ``name`` lie. Raises OneStepError where it would lie inside another run, or the other
    way round."""
    root = Path(folder_paths.get_output_directory()) / SUBFOLDER
    folder = root / checked_name(name)
    around = [place for place in folder.parents if place.is_relative_to(root) and (place / "config.json").is_file()]
    within = [] if (folder / "config.json").is_file() else [path.parent for path in folder.rglob("config.json")]
    for other in [*around, *within]:
        raise OneStepError(
            f"the name {name[:80]!r} cannot be used: there is a run {other.relative_to(root).as_posix()!r}, and one "
            "cannot lie inside the other. Give another name"
        )
    return folder


def pictures_folder(name: str, setting: str) -> Path:
    """The folder ``name`` of ComfyUI's input folder, as a ``setting`` tells it. Raises OneStepError for what is no
    folder's name there."""
    root = Path(folder_paths.get_input_directory())
    folder = root / checked_name(name)
    if not folder.resolve().is_relative_to(root.resolve()):
        raise OneStepError(f"{setting} {name[:80]!r} leads out of ComfyUI's input folder: put the pictures there")
    return folder


@contextmanager
def named_places() -> Iterator[None]:
    """Within, a OneStepError names places as ComfyUI's user knows them (``output/...``), not this machine's paths."""
    try:
        yield
    except OneStepError as error:
        error.args = (shown(str(error)),)
        raise


def shown(text: str) -> str:
    """``text`` with ComfyUI's own folders by their short names."""
    roots = {
        folder_paths.get_output_directory(): "output",
        folder_paths.get_input_directory(): "input",
        folder_paths.get_temp_directory(): "temp",
        folder_paths.models_dir: "models",
        str(PACK): "OneStep",
        **{path: f"models/{kind}" for kind in (LORAS, ADAPTERS, "controlnet") for path in paths_of(kind)},
    }
    for path in sorted(roots, key=len, reverse=True):
        text = text.replace(str(path), roots[path])
    return text


# -- files ------------------------------------------------------------------------------------------------------------


def paths_of(kind: str) -> list[str]:
    """The folders of a kind of file."""
    return list(folder_paths.get_folder_paths(kind))


def files_of(*kinds: str) -> list[str]:
    """The files of these kinds as a loader lists them, each name once; a word where there is none, for a list without
    entries cannot be shown."""
    found = list(dict.fromkeys(name for kind in kinds for name in folder_paths.get_filename_list(kind)))
    return found or [NONE_YET]


def path_of(name: str, *kinds: str) -> Path:
    """Where the first of these kinds has a file ``name``. Raises OneStepError where none has it."""
    found = [path for kind in kinds if (path := folder_paths.get_full_path(kind, name))]
    if not found:
        raise OneStepError(f"there is no file {name[:100]!r} in models/{places_of(kinds)}: check the name")
    return Path(found[0])


def places_of(kinds: tuple[str, ...]) -> str:
    return " or models/".join(SUBFOLDER if kind == ADAPTERS else kind for kind in kinds)


def publish(result: Path, name: str, kind: str) -> str:
    """Copy a result to models/loras/onestep, or an adapter to models/onestep; the name under which loaders list it."""
    listed = f"{SUBFOLDER}/{checked_name(name)}{SUFFIX}" if kind == LORAS else f"{checked_name(name)}{SUFFIX}"
    place = Path(paths_of(kind)[0]) / listed
    beside = place.with_name(f".{place.name}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(result, beside)
        os.replace(beside, place)
    except OSError as error:
        raise OneStepError(
            f"the result could not be copied to {place}: {error.strerror}. It lies in {result}: copy it by hand"
        ) from None
    finally:
        beside.unlink(missing_ok=True)
    return listed


def publish_second(result: Path, name: str, recipe: Recipe) -> None:
    """Copy beside a LoRA of this name what its run has made for diffusers, where no one file serves both hosts."""
    second = second_file(result, recipe.family, "comfyui")
    for path in run_files(second, recipe) if second else ():
        ending = path.stem.removeprefix(result.stem)
        publish(path, f"{name}{ending}", LORAS)


def stamp(name: Any, *kinds: str) -> Any:
    """When a file was written and how large it is: by that a node knows that it has changed. None for no file.

    NaN, which equals nothing, where the name is not known yet: it comes from another node (ComfyUI gives None).
    """
    if not isinstance(name, str):
        return float("nan")
    found = [path for kind in kinds if (path := folder_paths.get_full_path(kind, name))]
    return (os.stat(found[0]).st_mtime_ns, os.stat(found[0]).st_size) if found else None


def inside_input(path: str) -> Path:
    """A file or folder under ComfyUI's input folder. Raises OneStepError for one outside it, or that is not there."""
    root = Path(folder_paths.get_input_directory()).resolve()
    try:
        found = (root / path.strip()).resolve()
    except (OSError, ValueError, RuntimeError):
        found = root.parent
    if not found.is_relative_to(root):
        raise OneStepError(
            f"{path[:120]!r} lies outside ComfyUI's input folder: put the file into that folder and give its name"
        )
    if not found.exists():
        raise OneStepError(f"{path[:120]!r} is not in ComfyUI's input folder: check the name")
    return found
