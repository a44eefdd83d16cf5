"""What was planned, for a person and for a program."""

from __future__ import annotations

import math
from typing import Any

from ...core.words import duration, in_gb
from .cards import GIB, Card
from .ladder import Planned
from .rungs import Rung
from .whole import Whole

HEAD = ("rung", "GiB", "most in", "forwards", "seconds an update")
NOTE = "Counted, not measured on a GPU: bytes of tensors; the least seconds, by the card's data sheet."


def told(plan: Planned) -> str:
    """The table of rungs, and in a line what a run does."""
    rows = [HEAD, *(_row(plan, rung) for rung in plan.rungs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rung = plan.taken or plan.proposed or plan.rungs[-1]
    crowded = [plan.card.crowded] if plan.card and plan.card.crowded else []
    said = [line(plan), *crowded, made_of(plan.taken or plan.rungs[-1]), *whole_run(rung.whole), NOTE]
    return "\n".join([_title(plan), "", *table, "", *said])


def _title(plan: Planned) -> str:
    settings = plan.settings
    run = f"{plan.name}, {settings.method} at {settings.sizes}, batch {settings.batch}, rank {settings.rank} on "
    where = f"; {plan.card.name}: {_gib(plan.card.usable)} GiB for tensors" if plan.card else "; no card here"
    return run + f"{settings.targets} layers{where}"


def _row(plan: Planned, rung: Rung) -> tuple[str, ...]:
    fits = "fits: " if plan.card is not None and rung.fits(plan.card) else ""
    seconds = "-" if plan.card is None else f"{rung.seconds:.3g}"
    return (fits + rung.way.words, _gib(rung.peak.bytes), rung.part, f"{rung.forwards:.1f}", seconds)


def line(plan: Planned) -> str:
    """What a run does, in a line."""
    if plan.card is None:
        return f"It needs {_gib(plan.rungs[0].peak.bytes)} GiB of tensors as it is set; say --card to have it fitted."
    if plan.taken is not None:
        as_set = "as it is set" if plan.taken.way == plan.as_set else f"by itself with {plan.taken.way.words}"
        return f"A run fits {as_set}: {_gib(plan.taken.peak.bytes)} of {_gib(plan.card.usable)} GiB."
    rung = plan.proposed
    if rung is None:
        least = min(rung.peak.bytes for rung in plan.rungs)
        return f"Nothing tried fits: {_gib(least)} GiB at the least, where there are {_gib(plan.card.usable)}."
    base = f" the base in {rung.way.storage} (docs/on-your-card.md)" if rung.way.storage else ""
    changes = "".join(f" --set {name}={value}" for name, value in rung.way.changes.items())
    both = base + (" and" if base and changes else "") + changes
    return f"A run does not fit as it is set. It would with:{both}"


def made_of(rung: Rung) -> str:
    """What the most is made of."""
    parts = sorted(rung.peak.made_of.items(), key=lambda entry: -entry[1])
    return "Then: " + ", ".join(f"{label} {_gib(bytes)}" for label, bytes in parts if bytes >= GIB / 200) + " GiB."


def whole_run(whole: Whole) -> list[str]:
    """What all of it takes: at least so long, and so much of the disk."""
    parts = sorted(whole.seconds.items(), key=lambda entry: -entry[1])
    long = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts)
    times = [f"The whole run takes at least {duration(sum(whole.seconds.values()))}: {long}."] if parts else []
    kept = ", ".join(f"{name} {in_gb(bytes)}" for name, bytes in whole.disk.items())
    texts = f"and {in_gb(1000 * whole.text)} for each thousand prompts"
    return [*times, f"On the disk: {kept}, {texts}."] if whole.disk else times


def in_short(plan: Planned, prompts: int) -> str:
    """What a run says of its whole time and its disk as it begins."""
    whole = (plan.taken or plan.rungs[-1]).whole
    long = f"At least {duration(sum(whole.seconds.values()))} in all, and " if whole.seconds else ""
    disk = f"{in_gb(sum(whole.disk.values()) + prompts * whole.text)} of disk."
    return f"{long}{disk}" if long else f"Up to {disk}"


def _gib(bytes: float) -> str:
    return f"{bytes / GIB:.2f}" if bytes < 10 * GIB else f"{bytes / GIB:.1f}"


def facts(plan: Planned) -> dict[str, Any]:
    """The same for a program."""
    card = plan.card
    return {
        "model": plan.name,
        "settings": plan.settings.flat(),
        "card": None if card is None else _card_facts(card),
        "rungs": [rung_facts(rung) for rung in plan.rungs],
        "taken": None if plan.taken is None else plan.rungs.index(plan.taken),
        "line": line(plan),
    }


def _card_facts(card: Card) -> dict[str, Any]:
    return {"name": card.name, "bytes": card.size, "usable_bytes": card.usable, "taken_by_others": card.taken}


def rung_facts(rung: Rung) -> dict[str, Any]:
    return {
        "micro_batch": rung.way.micro,
        "recompute": rung.way.recompute,
        "moments_on_host": rung.way.moments_on_host,
        "streamed": rung.way.streamed,
        "storage": rung.way.storage,
        "changes": rung.way.changes,
        "bytes": rung.peak.bytes,
        "part": rung.part,
        "made_of": rung.peak.made_of,
        "parts": {name: peak.bytes for name, peak in rung.parts.items()},
        "forwards_a_sample": round(rung.forwards, 3),
        "seconds_an_update": None if math.isclose(rung.seconds, 0) else rung.seconds,
        "seconds": rung.whole.seconds,
        "disk": rung.whole.disk | {"a_prompt": rung.whole.text},
    }
