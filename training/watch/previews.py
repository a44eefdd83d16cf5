"""Preview grids: teacher above student, or what else it is compared with; the same prompt and noise in each column."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..runs.files import write_bytes

GAP = 2


def grid(rows: list[Tensor], least: int = 64) -> Image.Image:
    """One picture of ``rows`` of pictures, each [N, 3, H, W] in [0, 1]; small ones are enlarged by a whole factor."""
    scale = max(1, -(-least // rows[0].shape[-1]))
    lines = [torch.cat([_framed(picture, scale) for picture in row], 2) for row in rows]
    pixels = torch.cat(lines, 1).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def labelled(rows: list[tuple[str, Tensor]], width: int = 190, size: int = 15) -> Image.Image:
    """``grid`` of the rows' pictures, with what is said of each row at its left."""
    pictures = grid([row for _, row in rows])
    whole = Image.new("RGB", (pictures.width + width, pictures.height), "white")
    whole.paste(pictures, (width, 0))
    pen, font, height = ImageDraw.Draw(whole), ImageFont.load_default(size), pictures.height / len(rows)
    for at, (words, _) in enumerate(rows):
        pen.multiline_text((GAP + 6, at * height + 6), words, "black", font)
    return whole


def write_labelled(path: Path, rows: list[tuple[str, Tensor]]) -> None:
    """``labelled(rows)`` as a PNG at ``path``."""
    _write(path, labelled(rows))


def write_grid(path: Path, rows: list[Tensor]) -> None:
    """``grid(rows)`` as a PNG at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, grid(rows))


def _write(path: Path, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def _framed(picture: Tensor, scale: int) -> Tensor:
    big = picture.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return torch.nn.functional.pad(big, (GAP, GAP, GAP, GAP), value=1.0)
