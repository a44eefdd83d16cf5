"""Pictures as PNG files: whole, or not there."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..training.runs.files import write_bytes

GAP, MOST_COLUMNS, LABEL = 2, 8, 12


def write_sheet(path: Path, pictures: Tensor) -> None:
    """[N, 3, H, W] in [0, 1] as they are, side by side, at most 8 in a row; a single one fills the file."""
    columns = min(len(pictures), MOST_COLUMNS)
    missing = -len(pictures) % columns
    filled = torch.cat([pictures, torch.ones_like(pictures[:1]).expand(missing, -1, -1, -1)])
    rows = filled.unflatten(0, (-1, columns))
    save(path, image_of(sheet(rows, GAP if len(pictures) > 1 else 0)))


def comparison(path: Path, rows: dict[str, Tensor], least: int = 64) -> None:
    """Named rows [N, 3, H, W] of pictures under each other, a name above each; small ones enlarged."""
    first = next(iter(rows.values()))
    scale = max(1, -(-least // first.shape[-1]))
    parts = [image_of(sheet(big(row, scale)[None], GAP)) for row in rows.values()]
    whole = Image.new("RGB", (parts[0].width, sum(part.height + LABEL for part in parts)), "white")
    pen, at = ImageDraw.Draw(whole), 0
    for name, part in zip(rows, parts, strict=True):
        pen.text((GAP, at), name, fill="black")
        whole.paste(part, (0, at + LABEL))
        at += part.height + LABEL
    save(path, whole)


def sheet(rows: Tensor, gap: int) -> Tensor:
    """[R, N, 3, H, W] -> [3, R H', N W'], white lines of ``gap`` pixels between pictures."""
    framed = torch.nn.functional.pad(rows, (0, gap, 0, gap), value=1.0)
    whole = framed.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return whole[:, : whole.shape[1] - gap, : whole.shape[2] - gap]


def big(pictures: Tensor, scale: int) -> Tensor:
    return pictures.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


def image_of(picture: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] -> 8 bits a channel."""
    pixels = picture.clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def save(path: Path, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())
