"""A control known by examples: a picture is found again by what it shows, whatever the order, and no other is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from onestep.core.controls import CONTROLS, control_of
from onestep.core.errors import OneStepError
from onestep.core.own_control import register_examples


@pytest.fixture(autouse=True)
def known_before() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = set(CONTROLS)
    yield
    for name in set(CONTROLS) - before:
        del CONTROLS[name]


def examples(count: int = 6, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, 32, 32, generator=draw), torch.rand(count, channels, 32, 32, generator=draw)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_finds_its_own_control(channels: int) -> None:
    pictures, controls = examples(channels=channels)
    control = control_of(register_examples("mine", pictures, controls))
    order = [3, 0, 5, 0]
    wanted = np.round(255 * controls[order].numpy()) / 255  # as a file of pictures keeps it
    np.testing.assert_allclose(control(pictures[order]).numpy(), wanted, atol=1e-6)
    # as a decoder's rounding, or that of a file, leaves it
    near = ((255 * pictures[order]).round() / 255 + 1e-4).clamp(0, 1)
    np.testing.assert_allclose(control(near).numpy(), wanted, atol=1e-6)
    assert control.channels == channels


def test_another_picture_has_none() -> None:
    pictures, controls = examples()
    control = control_of(register_examples("mine", pictures, controls))
    brighter = (pictures[:1] + 0.02).clamp(0, 1)
    with pytest.raises(OneStepError, match="6 pictures, and the run draws another one: draw the pictures anew"):
        control(torch.cat([pictures[1:2], brighter]))


def test_a_set_of_examples_is_its_name() -> None:
    pictures, controls = examples()
    first = register_examples("mine", pictures, controls)
    assert register_examples("mine", pictures, controls) == first and first.startswith("mine-")
    assert (
        len({first, register_examples("mine", pictures, 1 - controls), register_examples("yours", pictures, controls)})
        == 3
    )


def test_controls_of_another_size_are_resized() -> None:
    """A slope stays that slope; its ends, beyond which nothing is known, are a little flatter."""
    pictures, _ = examples()
    steep = torch.linspace(0.2, 1, 6)[:, None, None, None]
    wide, narrow = ((torch.arange(side) + 0.5).div(side).expand(6, 1, 32, side) * steep for side in (128, 32))
    control = control_of(register_examples("mine", pictures, wide))
    assert float((control(pictures) - narrow).abs().max()) < 0.01


@pytest.mark.parametrize(
    ("pictures", "controls", "words"),
    [
        ((6, 3, 8, 8), (5, 1, 8, 8), "5 controls for 6 pictures"),
        ((6, 1, 8, 8), (6, 1, 8, 8), r"\[6, 1, 8, 8\]"),
        ((6, 3, 8, 8), (6, 4, 8, 8), "1 or 3"),
    ],
)
def test_what_are_no_examples_is_refused(pictures: tuple[int, ...], controls: tuple[int, ...], words: str) -> None:
    with pytest.raises(OneStepError, match=words):
        register_examples("mine", torch.rand(pictures), torch.rand(controls))
    with pytest.raises(OneStepError, match="finite"):
        register_examples("mine", torch.rand(2, 3, 8, 8), torch.full((2, 1, 8, 8), float("nan")))
