"""A card's memory as a bar: what lies in it where the most does, and where it ends."""

from __future__ import annotations

from PIL import Image, ImageColor, ImageDraw

from .cards import GIB
from .ladder import Planned

WIDTH, BAR, ROW, EDGE = 960, 72, 30, 24
COLOURS = {"base": "#4c72b0", "activations": "#dd8452", "student": "#55a868", "critic": "#c44e52", "ema": "#8172b3"}
PALER = {"moments": 0.35, "gradients": 0.65}
"""What belongs to a role has its colour, mixed with so much white."""
OTHER = "#8c8c8c"


def bar(plan: Planned) -> Image.Image:
    """The rung that a run takes, or the last that was tried, against the card's memory."""
    rung = plan.taken or plan.rungs[-1]
    parts = sorted(rung.peak.made_of.items(), key=lambda entry: -entry[1])
    whole = max(rung.peak.bytes, plan.card.size if plan.card else 0) * 1.02
    picture = Image.new("RGB", (WIDTH, 3 * EDGE + ROW + BAR + ROW * (len(parts) + 1)), "white")
    draw = ImageDraw.Draw(picture)
    scale, at, top = (WIDTH - 2 * EDGE) / whole, float(EDGE), EDGE + ROW
    title = f"{plan.name}: {rung.peak.bytes / GIB:.2f} GiB of tensors in {rung.part}; {rung.way.words}"
    draw.text((EDGE, EDGE / 2), title, "black", font_size=18)
    for number, (label, bytes) in enumerate(parts):
        end = at + bytes * scale
        draw.rectangle((at, top, end, top + BAR), fill=colour(label))
        line = top + BAR + EDGE + ROW * number
        draw.rectangle((EDGE, line + 5, EDGE + 16, line + 21), fill=colour(label))
        draw.text((EDGE + 26, line), f"{label}  {bytes / GIB:.2f} GiB", "black", font_size=18)
        at = end
    if plan.card is not None:
        for bytes, ink in ((plan.card.usable, "#202020"), (plan.card.size, "#b0b0b0")):
            draw.line((EDGE + bytes * scale, top - 8, EDGE + bytes * scale, top + BAR + 8), ink, 3)
        last = top + BAR + EDGE + ROW * len(parts)
        words = f"line: {plan.card.usable / GIB:.2f} GiB for tensors on {plan.card.name}; grey: all of it"
        draw.text((EDGE, last), words, "black", font_size=18)
    return picture


def colour(label: str) -> str:
    """Of its role, paler for what the role's learning takes: no two parts look alike."""
    owner, _, kind = label.partition(" ")
    own, white = ImageColor.getrgb(COLOURS.get(owner, OTHER)), PALER.get(kind, 0.0)
    return "#" + "".join(f"{round(value + (255 - value) * white):02x}" for value in own[:3])
