"""An update of student and critic on one base, beside the same on three full networks, and beside FastGen's DMD2 step
where its checkout was carried along."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

import fastgen_step
import step
from part import Case, Run, Table, table_of

COLUMNS = ("update", "seconds", "peak GB")
KINDS: dict[str, Any] = {"one base, roles": step.Shared, "three full networks": step.Separate}


def measure(run: Run) -> Table:
    sizes = [("small", 32, 1)] if run.tiny else [("sd15", 512, 4), ("sdxl", 1024, 1), ("sdxl", 1024, 4)]
    cases = [
        Case(f"{layout} {size}, batch {count}: {name}", partial(update, kind, layout, size, count, run), 8)
        for layout, size, count in sizes
        for name, kind in KINDS.items()
    ]
    cases.append(Case("FastGen, DMD2 on SDXL 1024, batch 1", partial(fastgen_step.update, run), 20))
    return table_of(run, COLUMNS, cases, NOTE)


NOTE = (
    "One turn of the critic and one of the student, checkpointed, adapters of rank 64 on one base; three full networks "
    "train student and critic whole, in float32 under autocast, with AdamW."
)


def update(kind: Any, layout: str, size: int, count: int, run: Run) -> Sequence[Any]:
    told = step.measured(kind, layout, size, count, Namespace(rank=8 if run.tiny else 64, runs=1 if run.tiny else 3))
    return [cell.strip() for cell in told.split("|")]
