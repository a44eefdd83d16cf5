"""The diffusers host: the only place that imports diffusers. Its names are imported when they are first asked for."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_LAZY = {
    "OneStepPipeline": ".one_step",
    "adapt": ".adapt",
    "DiffusersHost": ".adapt",
    "diffusers_settings": ".plain",
    "distill": ".distill",
    "diverse": ".diversity",
    "draw_by_experts": ".experts",
    "load": ".load",
    "path_of": ".bundled",
    "steered": ".steer",
    "Steering": "..core.guidance",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = found
    return found


class _Package(ModuleType):
    """A submodule that is imported would take the place of the function of its name, ``adapt`` for one."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
