"""The table of an evaluation: aligned text for a person, JSON for a program."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from .measures import Estimate

TITLES = {
    "fd": "FD-local",
    "sliced": "sliced W",
    "fd_real": "FD-local real",
    "sliced_real": "sliced W real",
    "group": "group",
    "colour": "colour",
    "brightness": "brightness",
    "variety": "variety",
}
"""The measures that a person is shown, in this order; JSON holds them all."""
LEGEND = {
    "fd": "FD-local: squared Frechet distance in the judge's features to the teacher's pictures",
    "sliced": "sliced W: sliced Wasserstein distance of the pixels to the teacher's pictures",
    "fd_real": "real: the same to real pictures",
    "group": "group, colour, brightness: share of pictures in which the judge finds what the prompt asks for",
    "variety": "variety: mean distance between the pictures of a prompt, as a share of the teacher's",
}


@dataclass(frozen=True)
class Row:
    """One line of the table. forwards: of the network, for one picture. seconds: for one picture, without decoding."""

    name: str
    steps: int
    forwards: int
    seconds: float
    peak_bytes: int
    measures: dict[str, Estimate]


@dataclass(frozen=True)
class Table:
    """rows: the teacher, its floors, then the LoRAs. about: what was done. counted: what the peak bytes are."""

    rows: list[Row]
    about: dict[str, Any]
    counted: str

    def to_json(self) -> str:
        """Numbers that are none (nothing was asked) become null."""
        return json.dumps(plain(asdict(self)), indent=1)

    def to_text(self) -> str:
        """Aligned columns, and what they mean."""
        shown = [name for name in TITLES if any(name in row.measures for row in self.rows)]
        head = ["", "steps", "forwards", "ms", "peak MiB", *(TITLES[name] for name in shown)]
        body = [[*_costs(row), *(_cell(row.measures.get(name)) for name in shown)] for row in self.rows]
        widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
        lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in [head, *body]]
        about = ", ".join(f"{name} {value}" for name, value in self.about.items())
        notes = [LEGEND[name] for name in shown if name in LEGEND]
        costs = f"forwards, ms: for one picture; peak: {self.counted}; ±: 95 % interval"
        return "\n".join([*(line.rstrip() for line in lines), "", about, *notes, costs])


def _costs(row: Row) -> list[str]:
    peak = f"{row.peak_bytes / 2**20:.0f}" if row.peak_bytes else "-"
    return [row.name, str(row.steps), str(row.forwards), f"{1000 * row.seconds:.1f}", peak]


def _cell(measure: Estimate | None) -> str:
    if measure is None or not math.isfinite(measure.value):
        return "-"
    half = (measure.high - measure.low) / 2
    if not math.isfinite(half):
        return f"{measure.value:.3g}"
    digits = max(0, 2 - math.floor(math.log10(max(abs(measure.value), 0.01))))
    return f"{measure.value:.{digits}f} ±{max(half, measure.high - measure.value):.{digits}f}"


def plain(value: Any) -> Any:
    """``value`` with null for every number that is none, as JSON wants it."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
