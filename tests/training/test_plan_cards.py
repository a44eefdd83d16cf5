"""A card that other programs have a part of, and the time to go before anything was measured."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from onestep.core.errors import OneStepError
from onestep.training.engine.turns import Phase, Plan, Turn
from onestep.training.plan.cards import Card, card_of, found_card
from onestep.training.watch.eta import Pace

GIB = 2**30


def test_what_other_programs_have_is_not_reckoned_with(monkeypatch: Any) -> None:
    """12 GiB, of which 5 are free, and 1 is this process's own: others have 6, a desktop's first one among them."""
    there = type("Properties", (), {"total_memory": 12 * GIB})()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3060")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: there)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 12 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB)
    card = found_card()
    assert card is not None and card.taken == 6 * GIB
    assert card.usable == int(0.9 * 7 * GIB - 0.7 * GIB)
    assert card.crowded == "Other programs have 6.0 GiB of the card: close them, and there is more room."


def test_a_desktop_is_reckoned_with_on_every_card() -> None:
    idle, desktop = (Card("made for a test", 8 * GIB, 10, 5, 100, taken) for taken in (0, GIB))
    assert idle.usable == desktop.usable == int(0.9 * 8 * GIB - 0.7 * GIB) and not desktop.crowded
    assert Card("made for a test", GIB, 10, 5, 100, 2 * GIB).usable == 0


@pytest.mark.parametrize("text", ["", "-4GB", "nan", "8 GPU", "1e99GB", "9999999GB", "12GB; rm", "RTX", "\x00"])
def test_what_is_no_card_is_a_sentence(text: str) -> None:
    with pytest.raises(OneStepError, match="12GB"):
        card_of(text)


def test_before_anything_is_measured_the_time_to_go_is_the_plans_least() -> None:
    turn = Turn("student", lambda batch, share, update: {}, 1e-4)
    plan = Plan(["student"], [Phase("all", 20, [turn], 3.0, fresh=5, fresh_cost=40.0)])
    assert Pace(plan, 0.5).left(0) == pytest.approx(0.5 * (20 * 3 + 5 * 40))
    assert math.isnan(Pace(plan).left(0))
