"""The words computed from pixels: colours by hue, brightness by luma, the background left out."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from onestep.pipelines.tiny_words import BRIGHTNESS, COLOURS, group_of, normalise, pixel_words, stem_of


def filled(colour: tuple[int, int, int], side: int = 12) -> np.ndarray:
    """A square of one colour on the data set's grey."""
    image = np.full((32, 32, 3), 127, np.uint8)
    image[:side, :side] = colour
    return image


def by_hue(degrees: float, value: float = 1.0) -> np.ndarray:
    red, green, blue = colorsys.hsv_to_rgb(degrees / 360.0, 1.0, value)
    return filled((round(255 * red), round(255 * green), round(255 * blue)))


@pytest.mark.parametrize(
    ("degrees", "word"),
    list(zip((0, 30, 58, 120, 180, 230, 300, 352), (*COLOURS[:7], "red"), strict=True)),
)
def test_colour_is_the_band_of_the_hue(degrees: float, word: str) -> None:
    assert pixel_words(by_hue(degrees))[0] == word


def test_every_colour_word_can_be_met() -> None:
    seen = {pixel_words(by_hue(degrees))[0] for degrees in range(360)} | {pixel_words(filled((60, 60, 60)))[0]}
    assert seen == set(COLOURS)


def test_brightness_is_of_the_foreground_alone() -> None:
    assert [pixel_words(filled((level,) * 3))[1] for level in (250, 80, 10)] == [BRIGHTNESS[0], None, BRIGHTNESS[1]]


def test_luma_weighs_green_above_blue() -> None:
    assert pixel_words(filled((0, 255, 0)))[1] == "bright"
    assert pixel_words(filled((0, 0, 255)))[1] == "dark"


def test_the_larger_share_of_chroma_wins() -> None:
    image = filled((200, 0, 0), side=16)
    image[:16, :6] = (0, 0, 200)
    assert pixel_words(image)[0] == "red"


def test_few_coloured_pixels_leave_a_tile_grey() -> None:
    image = filled((90, 90, 90), side=20)
    image[:4, :20] = (200, 0, 0)  # 80 of 400, below a quarter
    assert pixel_words(image)[0] == "grey"


def test_an_empty_tile_has_words_too() -> None:
    assert pixel_words(np.full((32, 32, 3), 127, np.uint8)) == ("grey", "bright")


def test_captions() -> None:
    assert normalise("  Weapon:  Giant Club ") == "weapon: giant club"
    assert group_of("Weapon: giant club, red") == "weapon"
    assert group_of("siren") is None


def test_variants_share_a_stem() -> None:
    assert stem_of("floor: sigil Y S") == stem_of("floor: sigil 2") == "floor: sigil"
    assert stem_of("water: deep water wave E") != stem_of("water: shallow")
