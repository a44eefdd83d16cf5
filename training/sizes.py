"""Picture sizes as a person writes them."""

from __future__ import annotations

from ..core.errors import OneStepError


def size_list(text: str) -> tuple[tuple[int, int], ...]:
    """(width, height) of each of the sizes in a text like 512x512,640x448. Raises OneStepError for what is none."""
    return tuple(_size(part) for part in text.split(","))


def _size(text: str) -> tuple[int, int]:
    if len(parts := text.strip().lower().split("x")) == 3 and all(part.isdigit() for part in parts):
        raise OneStepError(
            f"size {text.strip()[:60]} is not WIDTHxHEIGHT, but of {parts[2][:20]} frames: a run is on pictures, one "
            f"frame each to a model of videos: write {'x'.join(parts[:2])[:40]}"
        )
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise OneStepError(
            f"size {text.strip()!r:.60} is not WIDTHxHEIGHT: write it like 512x512 or 512x512,640x448"
        ) from None
    if width % 8 or height % 8 or not 8 <= width <= 8192 or not 8 <= height <= 8192:
        raise OneStepError(
            f"size {text.strip()[:60]}: width and height must be multiples of 8 between 8 and 8192 pixels"
        )
    return width, height
