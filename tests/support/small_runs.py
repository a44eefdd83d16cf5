"""Inputs of the trainers' nodes for runs that end within seconds: as little as a whole run can be."""

from __future__ import annotations

from typing import Any

from onestep.training.methods import METHODS
from onestep.training.settings import Settings, described

# Each phase, each turn, measures and previews, which the last update is not due for.
SMALL = {
    **{"warm_start": 2, "critic_warm_up": 1, "critic_updates": 1, "batch": 2, "pairs": 4, "warm_up": 1, "states": 1},
    **{"snapshots": 1, "twin_warm_up": 2},
    **{"watch_every": 2, "watch_samples": 4, "preview_every": 4, "preview_samples": 1, "save_every": 2},
}


def small(method: str, **changes: Any) -> dict[str, Any]:
    """The method and what makes its run small, with changes, as the node's inputs. A method's own settings are inputs
    like method.states; of SMALL those are taken that the run has."""
    shared = {entry.name for entry in described(Settings)}
    own = {entry.name for entry in described(METHODS[method].settings)}
    values = {name: value for name, value in SMALL.items() if name in shared | own} | changes
    return {"method": method} | {f"method.{name}" if name in own else name: value for name, value in values.items()}
