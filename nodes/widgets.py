"""Widgets of settings, read from their dataclasses: help, range, choices, and a neutral value that sets nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api.latest import io

from ..core.controls import CONTROLS
from ..core.recipe import PRESETS as RECIPES
from ..training.engine.donor import AUTO, OWN
from ..training.methods import METHODS
from ..training.settings import described

BY_PRESET = "by preset"
"""The neutral choice. A neutral number is -1, which no setting can be; a neutral text is empty."""
NEUTRAL = -1
YES, NO = "yes", "no"
MOST = 2**53
"""The greatest number that a page counts to without loss."""


def widget(entry: Any, advanced: bool | None = None) -> Any:
    """A widget for one setting. Optional: saved graphs outlive settings that are new."""
    meta = entry.metadata
    told: dict[str, Any] = {"optional": True, "advanced": advanced}
    choices = choices_of(entry)
    if choices or entry.type == "bool":
        options = [BY_PRESET, *(choices or (YES, NO))]
        return io.Combo.Input(entry.name, options=options, default=BY_PRESET, tooltip=meta["help"], **told)
    if entry.type == "str":
        return io.String.Input(entry.name, default="", dynamic_prompts=False, tooltip=meta["help"], **told)
    tooltip = f"{meta['help']} {NEUTRAL} = the preset's, or the method's own."
    told |= {"tooltip": tooltip, "default": NEUTRAL, "min": NEUTRAL}
    if entry.type == "int":
        return io.Int.Input(entry.name, max=min(int(meta["high"]), MOST), control_after_generate=False, **told)
    return io.Float.Input(entry.name, max=meta["high"], step=step_of(entry.default), round=False, **told)


def choices_of(entry: Any) -> Sequence[str]:
    """Of a setting; of two that do not hold theirs, what is there now."""
    if entry.name == "control":
        return [*CONTROLS]
    return (AUTO, OWN, *RECIPES) if entry.name == "initial_recipe" else entry.metadata["choices"]


def step_of(default: float) -> float:
    """Fine enough for the setting's default: 1e-05 for 1e-4, 0.01 for 4."""
    return 1e-5 if 0 < default < 1e-2 else 0.001 if 0 < default < 1 else 0.01


def method_input(names: Sequence[str], first: str | None, tooltip: str) -> Any:
    """The choice of a method, each with its own settings alone. first: an option before them, without any."""
    options = [io.DynamicCombo.Option(first, [])] if first else []
    for name in names:
        own = [widget(entry) for entry in described(METHODS[name].settings)]
        options.append(io.DynamicCombo.Option(name, own))
    return io.DynamicCombo.Input("method", options=options, tooltip=tooltip)


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the widgets' values that set something, as settings have them."""
    found = {name: value for name, value in values.items() if value not in (None, "", BY_PRESET, NEUTRAL)}
    return {name: value == YES if value in (YES, NO) else value for name, value in found.items()}
