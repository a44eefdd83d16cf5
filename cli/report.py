"""onestep report: one picture to share of a run, with its figures: what it ran on, how it went, what it drew.

It tells settings by number and choice, never by text: no prompt, no name of a file, no path is in it. The same figures
lie in the picture's own text, key "onestep.report", as JSON.
"""

from __future__ import annotations

import io
import json
import math
import platform
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..training.methods import METHODS
from ..training.runs.files import read_rows, write_bytes
from ..training.settings import Settings, described
from .console import Console, duration
from .doctor import devices, version
from .figure import curve, stacked, text
from .model import run_config

KEY = "onestep.report"
PACKAGES = ("torch", "diffusers", "triton", "bitsandbytes")
MEASURES = ("distance", "content", "variety", "spread")
WIDTH = 900
"""Pixels of the picture, and the most of a preview in it."""


def run(args: Namespace, console: Console) -> None:
    folder = Path(args.run).expanduser()
    facts, rows = facts_of(folder), metrics_of(folder)
    path = Path(args.out).expanduser() if args.out else folder / "report.png"
    write_bytes(path, picture(facts, rows, last_preview(folder)))
    console.result("\n".join([*lines(facts), "", f"to share: {path}"]), facts | {"picture": str(path)})


def facts_of(folder: Path) -> dict[str, Any]:
    """What is told of the run in ``folder``."""
    config, rows = run_config(folder), metrics_of(folder)
    measured = [row for row in rows if finite(row.get("distance"))]
    return {
        "versions": {"onestep": version("onestep-diffusion"), **numbers_of(config.get("versions"))},
        "here": {"system": platform.system(), **{name: version(name) for name in PACKAGES}},
        "device": str(config.get("device", "unknown"))[:40],
        "cards": [device["title"] for device in devices()[1:]],
        "method": str(config["settings"].get("method"))[:40],
        "settings": dict(shareable(config["settings"])),
        "plan": planned_in(config.get("plan")),
        "peak_bytes": max((row["peak_bytes"] for row in rows if finite(row.get("peak_bytes"))), default=None),
        "updates": max((int(row["update"]) for row in rows), default=0),
        "seconds_an_update": seconds_an_update(rows),
        "measures": {
            "first": measures(measured[:1]),
            "best": measures(sorted(measured, key=lambda row: row["distance"])[:1]),
            "last": measures(measured[-1:]),
        },
    }


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in order; a last one that is cut off is left out."""
    return sorted(read_rows(folder / "metrics.jsonl"), key=lambda row: row["update"])


def shareable(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Those that differ from what the method has by itself, if they are numbers or choices; of a text, that there is
    one."""
    method = METHODS.get(str(settings.get("method")))
    known = [*described(Settings), *(described(method.settings) if method else ())]
    for entry in known:
        value = settings.get(entry.name, entry.default)
        if value == entry.default:
            continue
        is_told = isinstance(value, bool | int | float) or entry.metadata["choices"] or entry.name == "sizes"
        yield entry.name, value if is_told else "(given)"


def planned_in(plan: Any) -> str | None:
    """The plan's line. Where nothing could be counted it says why in somebody else's words, which may name a file."""
    line = plan.get("line") if isinstance(plan, dict) else None
    return line if not isinstance(line, str) or plan.get("rung") else line.split("(")[0].strip()


def numbers_of(versions: Any) -> dict[str, str]:
    return {str(name)[:20]: str(value)[:40] for name, value in versions.items()} if isinstance(versions, dict) else {}


def seconds_an_update(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The median of each phase, in the order in which the run met them."""
    phases: dict[str, list[float]] = {}
    for row in rows:
        if row["update"] and finite(row.get("seconds")):
            phases.setdefault(str(row.get("phase"))[:40], []).append(row["seconds"])
    return {phase: round(median(seconds), 4) for phase, seconds in phases.items()}


def measures(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {name: row[name] for row in rows for name in ("update", *MEASURES) if finite(row.get(name))}


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def lines(facts: dict[str, Any]) -> list[str]:
    """The figures for a person."""
    system, here = facts["here"]["system"], {name: facts["here"][name] for name in PACKAGES} | facts["versions"]
    packages = [f"{name} {found}" for name, found in here.items() if found]
    phases = [
        f"{phase} {duration(each) if each >= 60 else f'{each:.3g} s'}"
        for phase, each in facts["seconds_an_update"].items()
    ]
    said = [
        f"{facts['method']}, {facts['updates']} updates",
        f"on {facts['device']}, {system}; {', '.join(facts['cards']) or 'no GPU that torch can use'}",
        f"with {', '.join(packages)}",
        f"settings: {', '.join(f'{name} {value}' for name, value in facts['settings'].items()) or 'the defaults'}",
        f"an update: {', '.join(phases) or 'none yet'}",
    ]
    if facts["plan"]:
        said.append(f"planned: {facts['plan']}")
    if facts["peak_bytes"]:
        said.append(f"peak: {facts['peak_bytes'] / 2**30:.2f} GiB")
    for name, found in facts["measures"].items():
        told = [f"{measure} {found[measure]:.3f}" for measure in MEASURES if measure in found]
        said += [f"{name}, after update {found['update']:g}: {', '.join(told)}"] if told else []
    return said


def last_preview(folder: Path) -> Image.Image | None:
    """The newest one that can be read, no wider than the report."""
    for path in sorted((folder / "previews").glob("*.png"), reverse=True):
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # as Pillow says that it is broken
            continue
        return image.reduce(-(-image.width // WIDTH)) if image.width > WIDTH else image
    return None


def picture(facts: dict[str, Any], rows: list[dict[str, Any]], preview: Image.Image | None) -> bytes:
    """A PNG: the figures, the distance over the updates, the last preview; the figures as its text too."""
    points = [(row["update"], row["distance"]) for row in rows if finite(row.get("distance"))]
    parts = [text(lines(facts), WIDTH)]
    parts += [curve(points, WIDTH, "distance to the teacher, by update")] if len(points) > 1 else []
    parts += [preview] if preview else []
    told = PngInfo()
    told.add_text(KEY, json.dumps(facts))
    buffer = io.BytesIO()
    stacked(parts, WIDTH).save(buffer, "PNG", pnginfo=told)
    return buffer.getvalue()
