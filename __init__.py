"""OneStep: make a diffusion checkpoint draw in one step, in ComfyUI and in diffusers.

This folder is the ComfyUI pack and the package `onestep` at once. ComfyUI runs this file under a name made of the
folder's path; it then loads itself once more as `onestep`, so that a process holds one copy of every class.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
WEB_DIRECTORY = "./web"

_ROOT = Path(__file__).resolve().parent
# What the package offers by itself and where each thing lives; imported when it is first asked for.
_LAZY = {
    "distill": ".pipelines",
    "OneStepPipeline": ".pipelines",
    "comfy_entrypoint": ".nodes",
}


def _load_as_onestep() -> ModuleType:
    """Execute this file as the package `onestep`, or take the one this process already has."""
    known = sys.modules.get("onestep")
    if known is not None:
        _warn_if_elsewhere(known)
        return known
    spec = importlib.util.spec_from_file_location("onestep", __file__, submodule_search_locations=[str(_ROOT)])
    assert spec is not None and spec.loader is not None  # both are given for a file that is running
    package = importlib.util.module_from_spec(spec)
    sys.modules["onestep"] = package
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules["onestep"]  # as the import system does: nobody finds a half-made package
        raise
    return package


def _warn_if_elsewhere(package: ModuleType) -> None:
    """Two OneSteps in one process would be two of every class: the first one serves both, and says so."""
    home = Path(package.__file__ or "").resolve().parent
    if home != _ROOT:
        logging.warning("OneStep: %s was loaded before %s and serves in its place; remove one of them.", home, _ROOT)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = _load_as_onestep()
    return getattr(importlib.import_module(_LAZY[name], package.__name__), name)


if __name__ != "onestep":
    _load_as_onestep()
