"""What only a GPU can show, in one run: first whether all is right there, then what it costs.

    python benchmarks/gpu/run.py [--out results.md] [--minutes 8] [--only PART ...] [--tiny] [--wheels FOLDER]

It needs torch, and Triton where its kernels are to be tried; what else it needs may lie beside it as wheels, see
README.md here.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import checkout  # noqa: F401 -- makes this checkout importable as `onestep`
import torch
import wheels
from page import Page
from part import Part, Run, Table

sys.path.append(str(Path(__file__).resolve().parents[1]))


def _of(module: str) -> Callable[[Run], Table]:
    """``measure`` of a module, imported as its part begins: one that cannot be is its part's failure alone."""

    def measure(run: Run) -> Table:
        found: Table = importlib.import_module(module).measure(run)
        return found

    return measure


PARTS: tuple[Part, ...] = (
    Part("ops-right", "Every op against float64", _of("ops_right"), 60),
    Part("steps-right", "Two training steps against float32 on the CPU", _of("steps_right"), 50),
    Part("plan", "What was planned, and what was measured", _of("planned"), 150),
    Part("peers", "Against three full networks", _of("peers"), 60),
    Part("fast", "One step, drawn fast", _of("fast_path"), 60),
    Part("negatives", "Negatives and guidance adapters", _of("added"), 50),
    Part("ops-speed", "What the ops cost", _of("ops_speed"), 50),
)
"""In the order in which they run: what must be right first, then what is measured. A part takes a `Run` and gives a
`Table`; add one with a line here."""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.md"), help="the markdown that is written")
    parser.add_argument("--minutes", type=float, help="that it may take: 8, or 60 in a rehearsal")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts alone")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal at small sizes, on a CPU too")
    parser.add_argument("--wheels", type=Path, default=wheels.HERE, help="the folder of the wheels that were carried")
    given = parser.parse_args(words)
    minutes = given.minutes or (60 if given.tiny else 8)
    if not torch.cuda.is_available() and not given.tiny:
        print("torch sees no NVIDIA card: install its build for one, or rehearse with --tiny", file=sys.stderr)
        return 2
    run = Run(torch.device("cuda" if torch.cuda.is_available() else "cpu"), given.tiny)
    chosen = [part for part in PARTS if not given.only or part.name in given.only]
    with tempfile.TemporaryDirectory(prefix="onestep-wheels-") as folder:
        wheels.unpack(given.wheels, Path(folder))
        page = Page(run, given.out, given.wheels)
        with page.at_most(minutes):
            page.measure(chosen, minutes)
    print(page.text)
    return 0 if page.good else 1


if __name__ == "__main__":
    sys.exit(main())
