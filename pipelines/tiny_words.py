"""Words computed from the pixels of a tile, and the form of the captions that the tiny models know. NumPy alone."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

COLOURS = ("red", "brown", "yellow", "green", "cyan", "blue", "purple", "grey")
BRIGHTNESS = ("bright", "dark")

# Upper ends of the hue bands in degrees; what is left, up to 360, is red again.
_HUE_ENDS = (15.0, 45.0, 70.0, 165.0, 200.0, 260.0, 345.0)
_BACKGROUND = 127  # transparent tiles were laid on this grey
_LEAST_FOREGROUND = 24  # pixels; below it the background counts too
_CHROMATIC = 0.15  # chroma (max - min, of 1) from which a pixel has a colour
_COLOURFUL = 0.25  # share of coloured pixels from which the tile has one
_BRIGHT, _DARK = 0.38, 0.24  # mean luma of 1; between the two a tile is neither


def pixel_words(image: NDArray[np.uint8]) -> tuple[str, str | None]:
    """Dominant colour (one of COLOURS) and "bright", "dark" or None of a tile: image [H, W, 3], 0..255."""
    rgb = _foreground(image).astype(np.float64) / 255.0
    return _dominant_colour(rgb), _brightness(rgb)


def normalise(caption: str) -> str:
    """A data set's caption as the models read it: "group: name", lower case, single spaces."""
    return re.sub(r"\s+", " ", caption.lower()).strip()


def group_of(caption: str) -> str | None:
    """The group of a caption "group: name, word": None where it has none."""
    group, colon, _ = normalise(caption).partition(":")
    return group if colon else None


def stem_of(caption: str) -> str:
    """Caption without what tells variants of one picture apart: numbers, single letters, points of the compass."""
    words = re.sub(r"[0-9]+", "", normalise(caption)).split()
    sides = {"north", "south", "east", "west", "ne", "nw", "se", "sw", "left", "right", "top", "bottom"}
    return " ".join(word for word in words if len(word) > 1 and word not in sides)


def _foreground(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    pixels = image.reshape(-1, 3)
    seen = pixels[np.any(pixels != _BACKGROUND, axis=1)]
    return seen if len(seen) >= _LEAST_FOREGROUND else pixels


def _dominant_colour(rgb: NDArray[np.float64]) -> str:
    """The hue band with the largest summed chroma; "grey" where few of the pixels [N, 3] have a colour at all."""
    high = rgb.max(axis=1)
    chroma = high - rgb.min(axis=1)
    coloured = chroma >= _CHROMATIC
    if coloured.mean() < _COLOURFUL:
        return "grey"
    bands = np.searchsorted(_HUE_ENDS, _hue(rgb[coloured], high[coloured], chroma[coloured]), side="right") % 7
    return COLOURS[int(np.bincount(bands, weights=chroma[coloured], minlength=7).argmax())]


def _hue(rgb: NDArray[np.float64], high: NDArray[np.float64], chroma: NDArray[np.float64]) -> NDArray[np.float64]:
    """Hue in degrees [0, 360) by the hexagon formula; rgb [N, 3] with chroma > 0."""
    r, g, b = rgb.T
    by_red, by_green, by_blue = (g - b) / chroma % 6.0, (b - r) / chroma + 2.0, (r - g) / chroma + 4.0
    return 60.0 * np.select([high == r, high == g], [by_red, by_green], by_blue)


def _brightness(rgb: NDArray[np.float64]) -> str | None:
    luma = float((rgb @ np.array([0.299, 0.587, 0.114])).mean())  # ITU-R BT.601
    if luma > _BRIGHT:
        return "bright"
    return "dark" if luma < _DARK else None
