"""Updates that all at once take many times as long, and go on so: told, once, with what to do."""

from __future__ import annotations

from collections import deque
from statistics import median

KNOWN, LATELY, TIMES = 8, 5, 3.0
"""Updates whose seconds are the measure, those that are held against it, and by how much each of them is longer."""


class Slowdown:
    """Called after each update; says in words where they have become slow, else nothing."""

    def __init__(self) -> None:
        self._work, self._told = 0.0, False
        self._known: deque[float] = deque(maxlen=50)
        self._lately: deque[float] = deque(maxlen=LATELY)

    def __call__(self, work: float, seconds: float) -> list[str]:
        """seconds: of an update. work: in it, in forwards; updates of other work are measured by themselves."""
        if work != self._work:
            self._work = work
            self._known.clear()
            self._lately.clear()
        if len(self._lately) == LATELY:
            self._known.append(self._lately[0])
        self._lately.append(seconds)
        if self._told or len(self._known) < KNOWN:
            return []
        usual = median(self._known)
        if min(self._lately) < TIMES * usual:
            return []
        self._told = True
        return [
            f"an update takes {median(self._lately):.1f} s, where it took {usual:.1f}: something else uses the card, "
            "it is too hot, or its memory is full and the driver has gone over to the host's (NVIDIA on Windows: set "
            "CUDA - Sysmem Fallback Policy to Prefer No Sysmem Fallback). Close what else uses it, or stop the run and "
            "go on in smaller micro-batches (a larger accumulation)"
        ]
