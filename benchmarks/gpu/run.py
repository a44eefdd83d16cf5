"""What only a GPU can show, in one run: first whether every op is right there, then what it costs.

    python benchmarks/gpu/run.py [--out results.md] [--minutes 8] [--only PART ...] [--tiny]

It needs torch alone, and Triton where its kernels are to be tried; see README.md here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import time
import traceback
from pathlib import Path

import checkout  # noqa: F401 -- makes this checkout importable as `onestep`
import ops_right
import ops_speed
import torch
from part import Part, Run, Table

PARTS: tuple[Part, ...] = (
    Part("ops-right", "Every op against float64", ops_right.measure),
    Part("ops-speed", "What the ops cost", ops_speed.measure),
)
"""In the order in which they run: what must be right first, then what is measured. A part takes a `Run` and gives a
`Table`; add one with a line here."""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.md"), help="the markdown that is written")
    parser.add_argument("--minutes", type=float, default=8, help="no part begins after so many")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts alone")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal at small sizes, on a CPU too")
    given = parser.parse_args(words)
    if not torch.cuda.is_available() and not given.tiny:
        print("torch sees no NVIDIA card: install its build for one, or rehearse with --tiny", file=sys.stderr)
        return 2
    run = Run(torch.device("cuda" if torch.cuda.is_available() else "cpu"), given.tiny)
    chosen = [part for part in PARTS if not given.only or part.name in given.only]
    text, good = report(run, chosen, given.minutes)
    given.out.write_text(text, encoding="utf-8")
    print(text)
    return 0 if good else 1


def report(run: Run, parts: list[Part], minutes: float) -> tuple[str, bool]:
    """The whole markdown, and whether every part ran and found all right. A part that fails takes no other with it."""
    began, good = time.monotonic(), True
    pieces = ["# Measured on a GPU" if run.device.type == "cuda" else "# A rehearsal without a GPU", *machine(run)]
    for part in parts:
        pieces += ["", f"## {part.title}", ""]
        if time.monotonic() - began > 60 * minutes:
            pieces.append("Not run: no time was left.")
            good = False
            continue
        here = time.monotonic()
        try:
            table = part.measure(run)
        except Exception as trouble:  # the other parts are worth their numbers
            traceback.print_exc()
            table = Table(("failed",), [(f"{type(trouble).__name__}: {str(trouble).splitlines()[0][:200]}",)], False)
        good &= table.good
        pieces += [table.markdown(), "", f"{time.monotonic() - here:.0f} s."]
    return "\n".join(pieces) + "\n", good


def machine(run: Run) -> list[str]:
    """Card and versions."""
    lines = [f"- Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}"]
    for name in ("triton", "bitsandbytes", "diffusers", "xformers"):
        try:
            lines.append(f"- {name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"- {name} is not installed")
    if run.device.type == "cuda":
        card = torch.cuda.get_device_properties(run.device)
        lines.append(
            f"- {card.name}, {card.total_memory / 2**30:.1f} GiB, compute capability {card.major}.{card.minor}"
        )
    return ["", *lines]


if __name__ == "__main__":
    sys.exit(main())
