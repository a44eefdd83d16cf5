"""onestep methods: the methods by name, with their papers, what they cost and what each has of its own to set."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from .console import Console

SHOWN = ("name", "title", "paper", "forwards", "makes")


def run(args: Namespace, console: Console) -> None:
    from ..training.methods import METHODS
    from ..training.presets import PRESETS

    rows = [{key: getattr(method, key) for key in SHOWN} for method in METHODS.values()]
    lines = [line for row in rows for line in (f"{row['name']:<21}{row['title']}", f"{'':<21}{_more(row)}")]
    lines += ["", "Presets, by the outcome that you want:", *(f"{name:<21}{p.about}" for name, p in PRESETS.items())]
    console.result(page() if args.markdown else "\n".join(lines), rows)


def _more(row: dict[str, str]) -> str:
    return f"{row['paper']}; makes: {row['makes']}; network forwards an update: {row['forwards']}"


def page() -> str:
    """docs/methods.md."""
    from ..training.methods import METHODS
    from ..training.presets import PRESETS
    from ..training.settings import Settings, described

    owners: dict[Any, list[str]] = {}
    for method in METHODS.values():
        owners.setdefault(method.settings, []).append(f"`{method.name}`")
    parts = [
        "# Methods and settings",
        "Made by `onestep methods --markdown`.",
        _table(("method", "what it is", "makes", "paper", "network forwards of a sample in an update"), _rows(METHODS)),
        "Forwards are work, as `onestep plan sd15` counts it where nothing is computed again in backward; the anchor "
        "on the teacher's pairs is among them. A backward takes about one more where whole blocks are computed again. "
        "The steps before: of a student of N steps one is drawn, and each of its pictures (one a turn of the student, "
        "of the critic, of the head) takes (N - 1) / 2 more, in the mean.",
        "## Presets",
        "By the outcome that you want. What our own measurements (`docs/benchmarks.md`) do not speak of, several steps "
        "and donors, follows recipes that exist as code; none of it is measured on a GPU yet.",
        _table(
            ("preset", "what it is made of", "what it changes", "and with an `initial_lora`"),
            [(name, p.about, _changes(p.values), _changes(p.with_donor)) for name, p in PRESETS.items()],
        ),
        "## What every run has",
        _settings(described(Settings)),
    ]
    for kind, names in owners.items():
        if described(kind):
            parts += [f"## Of {' and '.join(names)} alone", _settings(described(kind))]
    return "\n\n".join(parts)


def _rows(methods: Any) -> list[tuple[str, ...]]:
    return [(f"`{m.name}`", m.title, m.makes, m.paper, m.forwards) for m in methods.values()]


def _changes(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in values.items())


def _settings(entries: list[Any]) -> str:
    rows = []
    for entry in entries:
        meta, default = entry.metadata, "empty" if entry.default == "" else entry.default
        bounds = ", ".join(meta["choices"]) or (
            f"{meta['low']:g} to {meta['high']:g}" if meta["low"] is not None else ""
        )
        rows.append((f"`{entry.name}`", str(default), bounds, meta["help"]))
    return _table(("setting", "default", "range", "what it is"), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
