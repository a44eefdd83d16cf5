"""Plain figures without a plotting library: lines of text, a curve with axes, and parts under each other."""

from __future__ import annotations

import textwrap

from PIL import Image, ImageDraw, ImageFont

MARGIN, FONT, LINE, HEIGHT, TICKS = 12, 14, 20, 220, 4
INK, FAINT, CURVE = "black", "#d0d0d0", "#1f5fbf"


def text(lines: list[str], width: int) -> Image.Image:
    """Black on white, wrapped."""
    font = ImageFont.load_default(FONT)
    letters = int((width - 2 * MARGIN) / font.getlength("n"))
    rows = [row for line in lines for row in textwrap.wrap(line, letters, subsequent_indent="    ") or [""]]
    image = Image.new("RGB", (width, len(rows) * LINE + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(image)
    for index, row in enumerate(rows):
        pen.text((MARGIN, MARGIN + index * LINE), row, INK, font)
    return image


def curve(points: list[tuple[float, float]], width: int, title: str) -> Image.Image:
    """Of two points (x, y) or more, from y = 0, with ticks on both axes."""
    image, font = Image.new("RGB", (width, HEIGHT), "white"), ImageFont.load_default(FONT)
    pen = ImageDraw.Draw(image)
    left, right, top, bottom = 5 * MARGIN, width - 2 * MARGIN, 3 * MARGIN, HEIGHT - 2 * MARGIN
    first, last = points[0][0], points[-1][0]
    most = max(y for _, y in points) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * (x - first) / ((last - first) or 1), bottom - (bottom - top) * y / most

    for index in range(TICKS + 1):
        x, y = first + (last - first) * index / TICKS, most * index / TICKS
        pen.line([place(first, y), place(last, y)], FAINT)
        pen.text((MARGIN, place(first, y)[1]), f"{y:.3g}", INK, font, anchor="lm")
        pen.text((place(x, 0)[0], bottom + 4), f"{x:.0f}", INK, font, anchor="ma")
    pen.line([place(x, y) for x, y in points], CURVE, 2)
    pen.text((left, MARGIN // 2), title, INK, font)
    return image


def stacked(parts: list[Image.Image], width: int) -> Image.Image:
    """Under each other on white, from the left margin."""
    whole = Image.new("RGB", (width, sum(part.height for part in parts) + MARGIN), "white")
    top = 0
    for part in parts:
        whole.paste(part, (0 if part.width == width else min(MARGIN, width - part.width), top))
        top += part.height
    return whole
