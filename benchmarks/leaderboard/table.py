"""The board as a page and a picture."""

from __future__ import annotations

import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rows import methods_in, ranked
from worlds import World, world_of

COUNTS = {"updates": "updates", "forwards": "forwards", "seconds": "seconds", "peak": "MB"}
"""Of a run, after the world's measures."""


def page(args: Any, rows: list[dict[str, Any]]) -> None:
    """Writes ``args.out`` and pictures of the same name."""
    world = world_of(args)
    floors = world.floors()
    batch, forwards = args.batch or world.batch, args.forwards or world.forwards
    asked = f"python benchmarks/leaderboard --world {args.world} --forwards {forwards} --batch {batch}"
    asked += f" --steps {' '.join(map(str, sorted({found['steps'] for found in rows})))}"
    more = sorted({found["seed"] for found in rows} - {0})
    lines = [
        f"# {world.title}: every method at equal network forwards",
        "",
        f"{world.about} {forwards} network forwards of a batch of {batch} for each run, pairs, roll-outs, critics and "
        "heads counted. A screening: papers train a thousand times as long.",
        "",
        f"    {asked} --out OUT.md",
        "",
        *([f"The best have seeds {' '.join(map(str, more))} too (`--best 5 --seeds ...`).", ""] if more else []),
        f"torch {torch.__version__}, {platform.machine()}, one thread. MB: the process's peak.",
        "",
        *_head("what", world),
        *(_line(name, [found], world) for name, found in floors.items()),
    ]
    for steps in sorted({found["steps"] for found in rows}):
        some = [found for found in rows if found["steps"] == steps]
        lines += ["", f"## In {steps} step{'s' * (steps > 1)}", "", *_head("method", world)]
        lines += _of_steps(some, world)
        if missing := [f"`{name}`" for name in methods_in(steps) if name not in {found["method"] for found in some}]:
            lines += ["", f"Not run: {', '.join(missing)}."]
    if world.notes:
        lines += ["", "## What was found", "", *(f"- {note}" for note in world.notes)]
    args.out.write_text("\n".join(lines) + "\n")
    if rows:
        plot(rows, world, args.out.with_suffix(".png"))
        gallery(args, rows, world)


def _head(what: str, world: World) -> list[str]:
    heads = [what, *world.measures.values(), *COUNTS.values()]
    return ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]


def _line(name: str, some: list[dict[str, Any]], world: World) -> str:
    """Means of a method's rows; with several seeds the first measure has their range too."""
    cells = [_shown(statistics.mean(found[key] for found in some)) for key in world.measures]
    if len(some) > 1:
        first = [found[next(iter(world.measures))] for found in some]
        cells[0] += f" ({min(first):.3f} to {max(first):.3f}, {len(some)} seeds)"
    last = {**some[0], "peak": some[0].get("peak", 0) / 1e6}
    counts = [f"{last[key]:.0f}" if last.get(key) else "" for key in COUNTS]
    return "| " + " | ".join([name, *cells, *counts]) + " |"


def _shown(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3f}"


def _of_steps(rows: list[dict[str, Any]], world: World) -> list[str]:
    """A line a method, the best first; then those that failed, with the reason."""
    best = ranked(rows, world.rank)
    lines = [_line(f"`{name}`", [found for found in rows if found["method"] == name], world) for name in best]
    failed = {found["method"]: found["failed"] for found in rows if "failed" in found}
    empty = " |" * (len(world.measures) + len(COUNTS) - 1)
    return lines + [f"| `{name}` | failed: {why}{empty}" for name, why in failed.items()]


def plot(rows: list[dict[str, Any]], world: World, path: Path) -> None:
    """What the order is by, one panel for each number of steps, the best above."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = sorted({found["steps"] for found in rows})
    figure, panels = pyplot.subplots(1, len(counts), figsize=(6 * len(counts), 8), squeeze=False)
    for panel, steps in zip(panels[0], counts, strict=True):
        some = [found for found in rows if found["steps"] == steps and "failed" not in found]
        names = ranked(some, world.rank)[::-1]
        values = [[world.rank(found) for found in some if found["method"] == name] for name in names]
        panel.barh(names, [statistics.mean(one) for one in values])
        panel.set(title=f"{steps} step{'s' * (steps > 1)}", xlabel=world.ranked_by)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def gallery(args: Any, rows: list[dict[str, Any]], world: World) -> None:
    """The teacher's pictures and below them each method's of the first seed, the best first, where there are some."""
    for steps in sorted({found["steps"] for found in rows}):
        best = ranked([found for found in rows if found["steps"] == steps], world.rank)
        strips = [args.runs / "shown.png", *(args.runs / f"{name}-{steps}-0" / "shown.png" for name in best)]
        shown = [Image.open(strip) for strip in strips if strip.is_file()]
        if len(shown) > 1:
            _stacked(shown, ["teacher", *best]).save(args.out.with_name(f"{args.out.stem}-{steps}.png"))


def _stacked(strips: list[Image.Image], names: list[str]) -> Image.Image:
    from PIL import ImageDraw

    width, height = strips[0].size
    board = Image.new("RGB", (width + 120, len(strips) * (height + 2)), "white")
    for at, (strip, name) in enumerate(zip(strips, names, strict=True)):
        board.paste(strip, (120, at * (height + 2)))
        ImageDraw.Draw(board).text((4, at * (height + 2) + height // 2 - 6), name, fill="black")
    return board
