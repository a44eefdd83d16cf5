"""Which rungs are tried for a card, which a run takes by itself, and which are proposed."""

from __future__ import annotations

from typing import Any

import layout_pipelines as layouts
import pytest

from onestep.core.errors import OneStepError
from onestep.pipelines.adapt import adapt
from onestep.pipelines.shells import Shell, of_host
from onestep.training.methods import settings_for
from onestep.training.plan.cards import CARDS, Card, card_of
from onestep.training.plan.ladder import EIGHT_BIT, planned, rung_of
from onestep.training.plan.text import told
from onestep.training.settings import Settings

GIB = 2**30


@pytest.fixture(scope="module")
def shell() -> Shell:
    return of_host(adapt(layouts.sd15()), "all")


def settings(**more: Any) -> Settings:
    few = {"warm_start": 0, "critic_warm_up": 0, "steps": 1, "watch_samples": 4, "sizes": "16x16", "batch": 4}
    return settings_for(method="dmd", **{**few, "rank": 64, "critic_updates": 1, **more})


def card(usable: int) -> Card:
    """One of which tensors may take so many bytes, or a few less."""
    found = Card("made for a test", int((usable + 0.7 * GIB) / 0.9), 10, 5, 100)
    assert 0 <= usable - found.usable < 4
    return found


def test_the_first_rung_that_fits_is_taken_down_to_the_byte(shell: Shell) -> None:
    peaks = [rung_of(shell.shell, settings(), None, micro, {}, True).peak.bytes for micro in (4, 2, 1)]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3
    for micro, bytes in zip((4, 2, 1), peaks, strict=True):
        plan = planned("it", shell.shell, settings(), card(bytes + 4))
        assert plan.taken is not None and (plan.taken.micro, plan.taken.changes) == (micro, {})
        below = planned("it", shell.shell, settings(), card(bytes - 1))
        assert below.taken is None or below.taken.micro < micro


def test_what_changes_the_result_is_proposed_and_never_taken(shell: Shell) -> None:
    least = rung_of(shell.shell, settings(), None, 1, {}, True).peak.bytes
    plan = planned("it", shell.shell, settings(), card(least - 1000))
    assert plan.taken is None and plan.proposed is not None
    assert plan.proposed.changes == {"optimizer": "adamw8bit"}
    assert "--set optimizer=adamw8bit --set accumulation=4" in told(plan)
    smaller = planned("it", shell.shell, settings(), card(least // 2))
    assert smaller.proposed is not None and smaller.proposed.changes["rank"] in (32, 16)


def test_a_card_that_nothing_fits_into_is_told_so(shell: Shell) -> None:
    plan = planned("it", shell.shell, settings(), card(100_000))
    assert plan.taken is plan.proposed is None and "Nothing tried fits" in told(plan)


def test_moments_of_eight_bits_and_a_mean_on_the_host_take_what_they_take(shell: Shell) -> None:
    plain = rung_of(shell.shell, settings(), None, 1, {}, False).parts["optimiser"]
    small = rung_of(shell.shell, settings(), None, 1, {"optimizer": "adamw8bit"}, True).parts["optimiser"]
    moments = [label for label in plain.made_of if label.endswith(" moments")]
    assert len(moments) == 2 and "ema" not in small.made_of
    for label in moments:
        assert small.made_of[label] == pytest.approx(EIGHT_BIT * plain.made_of[label], rel=1e-3)


def test_cards_are_found_by_name_and_by_size() -> None:
    assert card_of("4090").name == card_of("NVIDIA GeForce RTX 4090").name == "RTX 4090"
    assert card_of("rtx 4070 ti super").size == 16 * GIB
    assert card_of("12GB").usable == pytest.approx(10.1 * GIB, rel=0.01)
    assert all(card_of(known.name) == known for known in CARDS)
    with pytest.raises(OneStepError, match="no card"):
        card_of("GTX")


def test_seconds_are_the_roofline() -> None:
    """0.7 of 10 TFLOP/s, 0.8 of 100 GB/s, in 16 bits; the slower of the two."""
    made = Card("made for a test", 8 * GIB, 10, 5, 100)
    assert made.seconds(7 * 10**12, 0, 2) == pytest.approx(1)
    assert made.seconds(7 * 10**12, 0, 4) == pytest.approx(2)
    assert made.seconds(7 * 10**9, 80 * 10**9, 2) == pytest.approx(1)
