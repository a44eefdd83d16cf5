"""What runs need, counted: the aims in bytes, the rungs for cards of 8 to 24 GB, and every grade of checkpointing.

    python benchmarks/plan.py [sd15 sdxl sd35-medium flux-dev z-image] --out benchmarks/results/plan.md

Nothing is measured: the training step runs on the meta device (training/plan), on any machine, in some minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onestep.cli.plan import without_null
from onestep.core.recomputed import GRADES
from onestep.pipelines.shells import LAYOUTS, layout
from onestep.training.methods import settings_for
from onestep.training.plan.cards import GIB, TYPICAL, card_of
from onestep.training.plan.ladder import planned
from onestep.training.plan.rungs import Rung, Way, rung_of
from onestep.training.settings import Settings

MODELS = ("sd15", "sdxl", "sd35-medium", "flux-dev", "z-image")
CARDS = ("8GB", "12GB", "16GB", "24GB")
TIMED = ("RTX 3060", "RTX 4090")
BATCH = 4


@dataclass(frozen=True)
class Aim:
    """gib: of tensors, at the most. batch: of samples, at once where whole, else in micro-batches of one."""

    model: str
    gib: float
    whole: bool = False
    storage: str = ""
    rank: int = 64


AIMS = (
    Aim("sd15", 3.5, whole=True),
    Aim("sdxl", 9.0),
    Aim("sdxl", 5.5, storage="fp8", rank=32),
    Aim("sdxl", 5.5, storage="nf4", rank=32),
    Aim("sd35-medium", 8.0),
    Aim("flux-dev", 13.5, storage="nf4"),
)


def host_of(name: str) -> tuple[Any, Settings]:
    """The layout's shell, and the run that is counted: dmd, Balanced."""
    shell = layout(name)
    settings = settings_for(method="dmd", sizes="{}x{}".format(*shell.native_size), batch=BATCH)
    return shell, without_null(shell, settings, set())


def aims(name: str, shell: Any, settings: Settings) -> Iterator[tuple[str, ...]]:
    for aim in AIMS:
        if aim.model != name:
            continue
        changes = {} if aim.rank == settings.rank else {"rank": aim.rank}
        places = [(False, True), (True, True)]
        found = [rung_of(shell.shell, settings, None, way(aim, *place, changes=changes)) for place in places]
        size = f"batch {BATCH}" if aim.whole else f"batch {BATCH}, one at a time"
        told = f"{LAYOUTS[name].title} {settings.sizes}, {size}, {aim.storage or 'bf16'}, rank {aim.rank}"
        verdict = "reached" if found[1].peak.bytes <= aim.gib * GIB else "missed"
        if found[0].peak.bytes <= aim.gib * GIB:
            verdict = "reached, moments on the card too"
        yield told, f"{aim.gib:g}", gib(found[0]), gib(found[1]), found[1].part, verdict


def way(aim: Aim, moments: bool, mean: bool, changes: dict[str, Any]) -> Way:
    micro = BATCH if aim.whole else 1
    return Way(micro, moments_on_host=moments, mean_on_host=mean, storage=aim.storage, changes=changes)


def ladder(name: str, shell: Any, settings: Settings) -> Iterator[tuple[str, ...]]:
    for size in CARDS:
        plan = planned(name, shell.shell, settings, card_of(size))
        rung = plan.taken or plan.proposed
        does = "takes" if plan.taken else "proposes" if rung else "nothing fits"
        rung = rung or min(plan.rungs, key=lambda one: one.peak.bytes)
        room = f"{card_of(size).usable / GIB:.1f}"
        yield LAYOUTS[name].title, f"{size} ({TYPICAL[int(size[:-2])]})", room, does, *told(rung)


def told(rung: Rung) -> tuple[str, ...]:
    return rung.way.words, gib(rung), rung.part, f"{rung.forwards:.1f}", f"{rung.seconds:.3g} s"


def grades(name: str, shell: Any, settings: Settings) -> Iterator[tuple[str, ...]]:
    """By what is computed again and micro-batch; moments on the card, the mean on the host."""
    cards = [card_of(card) for card in TIMED]
    for grade in reversed(GRADES):
        for micro in (1, 4):
            rungs = [rung_of(shell.shell, settings, card, Way(micro, grade, mean_on_host=True)) for card in cards]
            away = rung_of(shell.shell, settings, None, Way(micro, grade, True, True))
            times = [f"{rung.seconds:.3g} s" for rung in rungs]
            yield LAYOUTS[name].title, grade, str(micro), gib(rungs[0]), gib(away), f"{rungs[0].forwards:.1f}", *times


def gib(rung: Rung) -> str:
    return f"{rung.peak.bytes / GIB:.2f}"


TABLES = (
    (
        "The aims, in GiB of tensors",
        aims,
        ("run", "aim", "counted", "moments on the host", "most in", ""),
    ),
    (
        "What a run takes on a card by itself, or proposes",
        ladder,
        ("model", "card", "for tensors", "", "rung", "GiB", "most in", "forwards", "seconds an update"),
    ),
    (
        "By what is computed again",
        grades,
        ("model", "computed again", "micro-batch", "GiB", "moments on the host", "forwards", *TIMED),
    ),
)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help=f"of {', '.join(LAYOUTS)}")
    parser.add_argument("--out", type=Path, help="a file for the tables; they are printed as well")
    args = parser.parse_args()
    began, rows = time.monotonic(), {title: [] for title, _, _ in TABLES}  # type: dict[str, list[tuple[str, ...]]]
    for name in args.models:
        shell, settings = host_of(name)
        for title, make, _ in TABLES:
            rows[title] += make(name, shell, settings)
    lines = [
        "# What runs need, counted",
        "",
        "`python benchmarks/plan.py`: dmd, Balanced, batch 4, bf16, rank 64 on all layers, where a row does not say",
        "otherwise. GiB of tensors where the most is alive; least seconds of an update, by the cards' data sheets.",
        "Counted on a CPU. Measured: not on a GPU.",
    ]
    for title, _, head in TABLES:
        lines += ["", f"## {title}", "", *table(head, rows[title])]
    text = "\n".join(lines) + "\n"
    print(text)
    print(f"{time.monotonic() - began:.0f} s")
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
