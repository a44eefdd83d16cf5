"""onestep methods: the methods by name, with their papers and what they cost."""

from __future__ import annotations

from argparse import Namespace

from .console import Console


def run(args: Namespace, console: Console) -> None:
    from ..training.methods import METHODS

    rows = [
        {"name": name, "title": m.title, "paper": m.paper, "forwards": m.forwards, "makes": m.makes}
        for name, m in METHODS.items()
    ]
    lines = [line for row in rows for line in (f"{row['name']:<16}{row['title']}", f"{'':<16}{_more(row)}")]
    console.result("\n".join(lines), rows)


def _more(row: dict[str, str]) -> str:
    return f"{row['paper']}; makes: {row['makes']}; network forwards an update: {row['forwards']}"
