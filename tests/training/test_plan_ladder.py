"""Which rungs are tried for a card, which a run takes by itself, and which are proposed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import layout_pipelines as layouts
import pytest
import torch

from onestep.core.errors import OneStepError
from onestep.core.stored import store
from onestep.pipelines.adapt import adapt
from onestep.pipelines.shells import Shell, of_host
from onestep.training.engine import host_moments
from onestep.training.methods import settings_for
from onestep.training.plan.cards import CARDS, Card, card_of
from onestep.training.plan.counted import counted
from onestep.training.plan.ladder import planned
from onestep.training.plan.rehearse import rehearse
from onestep.training.plan.rungs import EIGHT_BIT, Way, peaks_of, rung_of
from onestep.training.plan.storage import stored
from onestep.training.plan.text import told
from onestep.training.settings import Settings

GIB = 2**30


@pytest.fixture(scope="module")
def shell() -> Shell:
    return of_host(adapt(layouts.sd15()), "all")


def settings(**more: Any) -> Settings:
    few = {"warm_start": 0, "critic_warm_up": 0, "steps": 1, "watch_samples": 4, "sizes": "16x16", "batch": 4}
    return settings_for(method="dmd", **{**few, "rank": 64, "critic_updates": 1, "streaming": "off", **more})


def card(usable: int) -> Card:
    """One of which tensors may take so many bytes, or a few less."""
    found = Card("made for a test", int((usable + 0.7 * GIB) / 0.9), 10, 5, 100)
    assert 0 <= usable - found.usable < 4
    return found


GRADES = ("blocks", "feed-forwards", "nothing")


def smallest(shell: Shell, how: Settings) -> int:
    """Bytes of the least that leaves the result alone: where activations are few, that is the whole batch at once, as
    its gradients are not there before it."""
    return min(rung_of(shell.shell, how, None, Way(micro, "blocks", True, True)).peak.bytes for micro in (4, 2, 1))


@pytest.mark.broad
def test_less_is_kept_from_grade_to_grade_and_less_computed_again(shell: Shell) -> None:
    rungs = [rung_of(shell.shell, settings(), card(GIB), Way(4, grade)) for grade in GRADES]
    assert [rung.peak.bytes for rung in rungs] == sorted({rung.peak.bytes for rung in rungs})
    assert [rung.forwards for rung in rungs] == sorted({rung.forwards for rung in rungs}, reverse=True)


@pytest.mark.broad
def test_the_fastest_rung_that_fits_is_taken_down_to_the_byte(shell: Shell) -> None:
    """Whatever of them it is, it fits where there is room for it, and not with a byte less."""
    every = [
        rung_of(shell.shell, settings(), card(GIB), Way(micro, grade, host, True))
        for micro in (4, 2, 1)
        for grade in GRADES
        for host in (False, True)
    ]
    for room in sorted({rung.peak.bytes for rung in every})[::3]:
        plan = planned("it", shell.shell, settings(), card(room + 4))
        fitting = [rung for rung in every if rung.peak.bytes <= room + 4]
        assert plan.taken is not None and plan.taken.peak.bytes <= room + 4 and plan.taken.way.changes == {}
        tried = [rung for rung in fitting if rung.way.recompute in {one.way.recompute for one in plan.rungs}]
        assert plan.taken.seconds == min(rung.seconds for rung in tried)
    below = planned("it", shell.shell, settings(), card(smallest(shell, settings()) - 4))
    assert below.taken is None


@pytest.mark.broad
def test_a_run_without_checkpointing_goes_up_the_grades_it_needs(shell: Shell) -> None:
    how = settings(checkpointing=False, batch=1, rank=4, sizes="64x64")
    for grade in reversed(GRADES):
        bytes = rung_of(shell.shell, how, None, Way(1, grade, True, True)).peak.bytes
        plan = planned("it", shell.shell, how, card(bytes + 4))
        assert plan.taken is not None and plan.taken.way.recompute == grade
    assert {rung.way.recompute for rung in plan.rungs} == set(GRADES)


@pytest.mark.broad
def test_what_changes_the_result_is_proposed_and_never_taken(shell: Shell) -> None:
    least = smallest(shell, settings())
    plan = planned("it", shell.shell, settings(), card(least - 1000))
    assert plan.taken is None and plan.proposed is not None
    assert plan.proposed.way.changes == {"rank": 32} and "--set rank=32" in told(plan)
    smaller = planned("it", shell.shell, settings(), card(least // 2))
    assert smaller.proposed is not None and smaller.proposed.way.changes["rank"] == 16


@pytest.mark.broad
def test_a_base_in_sixteen_bits_is_proposed_in_fewer() -> None:
    small = of_host(adapt(layouts.sd15().to(torch.bfloat16)), "all")
    plan = planned("it", small.shell, settings(), card(smallest(small, settings()) - 1000))
    assert plan.taken is None and plan.proposed is not None and plan.proposed.way.storage == "fp8"
    assert "the base in fp8" in told(plan)
    least = planned("it", small.shell, settings(), card(smallest(small, settings()) // 2))
    ways = [rung.way for rung in least.rungs]
    assert [(way.storage, way.changes.get("rank")) for way in ways if way.storage][:5] == [
        *(("fp8", None), ("nf4", None), ("fp8", 32), ("nf4", 32), ("fp8", 16))
    ]


def test_a_card_that_nothing_fits_into_is_told_so(shell: Shell) -> None:
    plan = planned("it", shell.shell, settings(), card(100_000))
    assert plan.taken is plan.proposed is None and "Nothing tried fits" in told(plan)


def test_moments_of_eight_bits_and_what_lies_on_the_host_take_what_they_take(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = rung_of(shell.shell, settings(), None, Way(1)).parts["optimiser"]
    eight = Way(1, mean_on_host=True, changes={"optimizer": "adamw8bit"})
    small = rung_of(shell.shell, settings(), None, eight).parts["optimiser"]
    moments = [label for label in plain.made_of if label.endswith(" moments")]
    assert len(moments) == 2 and "ema" not in small.made_of
    for label in moments:
        assert small.made_of[label] == pytest.approx(EIGHT_BIT * plain.made_of[label], rel=1e-3)
    away = rung_of(shell.shell, settings(), None, Way(1, moments_on_host=True)).parts
    assert not any(label.endswith(" moments") for part in away.values() for label in part.made_of)
    # a small network's are one part, those of its warm start the most
    assert away["optimiser"].made_of["moments"] == max(plain.made_of[label] for label in moments)
    monkeypatch.setattr(host_moments, "PART", 100)
    few = rung_of(shell.shell, settings(), None, Way(1, moments_on_host=True)).parts
    assert few["optimiser"].made_of["moments"] == 800


@pytest.mark.broad
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_base_stored_in_fp8_is_what_a_base_in_fp8_is_counted_at(kind: torch.dtype) -> None:
    """Reckoned from 16 bits, and rehearsed with layers that were stored so, scales for each row among them."""
    pipe = layouts.sd15().to(torch.bfloat16)
    reckoned = stored(of_host(adapt(pipe), "all"), "fp8")
    shell = of_host(adapt(pipe), "all")
    whole = sum(value.nbytes for value in shell.network.parameters())
    for block in shell.blocks:
        for layer in block.modules():
            if type(layer) in (torch.nn.Linear, torch.nn.Conv2d):
                store(layer, kind)
    scales = sum(layer.weight_scale.nbytes for layer in shell.network.modules() if hasattr(layer, "weight_scale"))
    there = sum(value.nbytes for value in shell.network.parameters()) + scales
    assert reckoned.share * whole == pytest.approx(there, abs=1)
    plain = peaks_of(rehearse(of_host(adapt(pipe), "all"), settings()), settings(), Way(4), reckoned)
    real = peaks_of(rehearse(shell, settings()), settings(), Way(4))
    for part in ("dmd, critic", "dmd, student"):
        # the cast weight is not there where the most is, or is smaller than the largest; each weight is rounded
        assert real[part].bytes <= plain[part].bytes <= real[part].bytes + reckoned.cast + scales + 1000


def test_a_base_is_streamed_by_itself_where_nothing_else_fits(shell: Shell) -> None:
    """As it is set: never, always, or on a card on which what leaves the result alone does not fit otherwise."""
    resident = min(rung_of(shell.shell, settings(), None, Way(m, "blocks", True, True)).peak.bytes for m in (4, 2, 1))
    found = {how: planned("it", shell.shell, settings(streaming=how), card(resident - 1000)) for how in ("auto", "off")}
    assert found["off"].taken is None
    assert found["auto"].taken is not None and found["auto"].taken.way.streamed
    roomy = {how: planned("it", shell.shell, settings(streaming=how), card(64 * GIB)) for how in ("auto", "on")}
    assert roomy["auto"].taken is not None and not roomy["auto"].taken.way.streamed
    assert roomy["on"].taken is not None and roomy["on"].taken.way == roomy["on"].as_set and roomy["on"].as_set.streamed


def test_a_streamed_base_is_what_is_no_block_and_a_ring_of_two(shell: Shell) -> None:
    """And comes from the host in each pass: forward of the critic and of the student for it, and its backward."""
    how = settings()
    still, passing = (rung_of(shell.shell, how, card(GIB), Way(4, streamed=on)) for on in (False, True))
    sizes = [sum(value.nbytes for value in block.parameters()) for block in shell.blocks]
    there = still.peak.made_of["base"] - sum(sizes) + 2 * max(sizes)
    assert passing.peak.made_of["base"] == pytest.approx(there, abs=len(sizes) * 64 * 20)
    assert passing.peak.bytes < still.peak.bytes and "base streamed" in passing.way.words
    played = counted(shell.shell("all"), how, "blocks")
    # roles one after the other: its picture; it and its backward
    assert played.passes["dmd, critic"] == 1 + 2
    # its picture and backward; teacher with prompt and without, critic
    assert played.passes["dmd, student"] == 2 + 3


def test_four_bits_are_half_a_byte_and_a_scale_for_each_64() -> None:
    layer = torch.nn.Linear(128, 100, bias=False, dtype=torch.bfloat16)
    host = SimpleNamespace(network=torch.nn.Sequential(layer), blocks=[torch.nn.Sequential(layer)])
    found = stored(host, "nf4")  # type: ignore[arg-type]
    assert found.share * 2 * 12800 == pytest.approx(6400 + 4 * 200) and found.cast == 25600


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
