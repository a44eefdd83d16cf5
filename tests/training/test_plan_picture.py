"""The card's memory as a picture: what can be told apart in it."""

from __future__ import annotations

from onestep.training.plan.picture import COLOURS, OTHER, PALER, colour


def test_no_two_parts_look_alike() -> None:
    labels = [*COLOURS, *(f"{role} {kind}" for role in ("student", "critic") for kind in PALER)]
    assert len({colour(label) for label in labels}) == len(labels)
    assert all(colour(label) == shade for label, shade in COLOURS.items())
    assert colour("something new") == OTHER
    # half of the way to white, by hand: 0x55 = 85, and 85 + 0.35 (255 - 85) = 144.5
    assert colour("student moments")[1:3] == f"{round(144.5):02x}"
