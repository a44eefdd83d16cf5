"""Graphs of the distillation node that end within seconds: as little as a whole run can be."""

from __future__ import annotations

from typing import Any

# Each phase, each turn, measures and previews, which the last update is not due for.
SMALL = {
    **{"warm_start": 2, "critic_warm_up": 1, "critic_updates": 1, "batch": 2, "pairs": 4, "warm_up": 1},
    **{"watch_every": 2, "watch_samples": 4, "preview_every": 4, "preview_samples": 1, "save_every": 2},
}


def settings_node(server: Any, **changes: Any) -> dict[str, Any]:
    """Distillation Settings with its own defaults, made small, and changes."""
    known = server.get("/object_info/OneStepDistillationSettings")["OneStepDistillationSettings"]["input"]["optional"]
    values = {name: told[1]["default"] for name, told in known.items()}
    return {"class_type": "OneStepDistillationSettings", "inputs": {**values, **SMALL, **changes}}
