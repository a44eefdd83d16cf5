"""What a negative prompt and a guidance adapter add to a forward, by benchmarks/cost.py's rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from cost import CASES, PLAIN, Case, Row, Times, measured, ratios
from cost_diffusers import makers
from part import Run, Table

COLUMNS = ("network", "forward", "ms", "of the plain one", "peak GiB")
ROWS = (PLAIN, "NASA", "NAG", "AGD", "CFG")


def measure(run: Run) -> Table:
    names = ["toy-sd15"] if run.tiny else ["sd15-whole", "sdxl", "flux-slice"]
    dtype = torch.float32 if run.device.type == "cpu" else torch.bfloat16
    found = Table(COLUMNS, [], note="Medians of rounds that take each row once, in an order drawn anew.")
    for name in names:
        if run.left < (0 if run.tiny else 12):
            found.good = False
            found.rows.append((str(CASES[name]), f"not measured: {max(run.left, 0):.0f} s were left", "", "", ""))
            continue
        found.rows += rows_of(CASES[name], run, dtype)
        torch.cuda.empty_cache()
    return found


@torch.no_grad()
def rows_of(case: Case, run: Run, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    made = makers(case, run.device, dtype, "")
    rows: dict[str, Row] = {name: made[name]() for name in ROWS}
    if run.device.type == "cuda":
        for _ in range(2):  # kernels are chosen and compiled
            for row in rows.values():
                row()
    times = measured(rows, 1 if run.tiny else 9, run.device)
    return [(str(case), name, *_cells(times[name], times[PLAIN])) for name in ROWS]


def _cells(row: Times, plain: Times) -> Sequence[Any]:
    middle = statistics.median(ratios(row, plain))
    return 1000 * statistics.median(row.seconds.values()), middle, row.peak / 2**30
