"""Numbers in words."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """47 s, 5 min, 3 h 20 min; ? for what is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def in_gb(size: float) -> str:
    """``size`` in bytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
