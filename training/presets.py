"""Presets: settings that do well together, by name."""

from __future__ import annotations

from typing import Any

from ..core.errors import OneStepError
from .methods import METHODS, settings_for
from .settings import Settings, described

# The presets are changes to the defaults: Fast is the warm start alone, Best matches for longer with a surer critic.
# Adapt goes on from a donor, a few-step LoRA made for another base: it needs no warm start, and no pairs of one step.
PRESETS: dict[str, dict[str, Any]] = {
    "Fast": {"method": "regression", "steps": 600, "learning_rate": 5e-4},
    "Balanced": {"method": "dmd", "steps": 600, "warm_start": 600},
    "Best": {"method": "dmd", "steps": 3000, "warm_start": 1000, "critic_updates": 5, "pairs": 4096},
    "Adapt": {"method": "dmd", "steps": 600, "warm_start": 0, "anchor": 0.0, "critic_start": "donor"},
}


def preset(name: str, **changes: Any) -> Settings:
    """The settings of a preset, with changes. For another method than the preset's, its values for settings that this
    method has not are left out. Raises OneStepError for an unknown name."""
    if name not in PRESETS:
        raise OneStepError(f"no preset {name!r:.60}: the presets are {', '.join(PRESETS)}")
    method = changes.get("method", PRESETS[name]["method"])
    known = {"method", *(entry.name for entry in (*described(Settings), *described(METHODS[method].settings)))}
    values = {key: value for key, value in PRESETS[name].items() if key in known}
    return settings_for(**{**values, **changes})
