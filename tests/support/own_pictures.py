"""A person's folder of pictures with captions, and the settings by which a run learns of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image


def pictures_in(folder: Path, count: int = 3, side: int = 32) -> dict[str, Any]:
    """Of one colour each; drawn in the run's few steps."""
    folder.mkdir(parents=True)
    for row in range(count):
        Image.new("RGB", (side, side), (40 * row, 255 - 40 * row, 80)).save(folder / f"{row}.png")
        (folder / f"{row}.txt").write_text(f"picture number {row}")
    return {"pictures": str(folder), "drawn": "few"}


def pairs_in(folder: Path, count: int = 3, side: int = 32) -> dict[str, Any]:
    """Of two colours each, the better one with the pair's caption."""
    own = pictures_in(folder / "better", count, side)
    (folder / "worse").mkdir()
    for row in range(count):
        Image.new("RGB", (side, side), (200, 40 * row, 10)).save(folder / "worse" / f"{row}.png")
    return {**own, "pictures": str(folder)}


def needed_by(method: str, folder: Path) -> dict[str, Any]:
    """What ``method`` cannot be run without."""
    made = {"tune": pictures_in, "pso": pairs_in}.get(method)
    return made(folder / "own") if made else {}
