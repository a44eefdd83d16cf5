"""onestep methods: the methods by name, with their papers and what they cost."""

from __future__ import annotations

from argparse import Namespace

from .console import Console


def run(args: Namespace, console: Console) -> None:
    from ..training.methods import METHODS

    rows = [{"name": name, "title": m.title, "paper": m.paper, "forwards": m.forwards} for name, m in METHODS.items()]
    lines = [
        f"{row['name']:<12}{row['title']}\n{'':<12}{row['paper']}; network forwards an update: {row['forwards']}"
        for row in rows
    ]
    console.result("\n".join(lines), rows)
