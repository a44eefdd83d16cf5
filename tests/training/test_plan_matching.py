"""What a plan counts of pictures that are shared, of rarer anchors, of a LoRA for each step and of a head."""

from __future__ import annotations

from typing import Any

import layout_pipelines as layouts
import pytest

from onestep.pipelines.adapt import adapt
from onestep.pipelines.shells import of_host
from onestep.training.methods import settings_for
from onestep.training.plan.cards import Card
from onestep.training.plan.rungs import Way, rung_of

CARD = Card("made for a test", 12 * 2**30, 10, 5, 100)


@pytest.fixture(scope="module")
def rung() -> Any:
    """The rung of a run that is set so."""
    shell = of_host(adapt(layouts.sd15()), "all")

    def found(method: str = "dmd", **more: Any) -> Any:
        few = {"warm_start": 0, "critic_warm_up": 0, "steps": 1, "watch_samples": 4, "sizes": "16x16", "batch": 4}
        how = settings_for(method, **{**few, "rank": 64, "critic_updates": 3, **more})
        return rung_of(shell.shell, how, CARD, Way(4, "blocks"))

    return found


@pytest.mark.broad
def test_an_anchor_every_fourth_update_is_a_quarter_of_one(rung: Any) -> None:
    none, each, fourth = (rung(anchor=a, anchor_every=n).forwards for a, n in ((0.0, 1), (0.25, 1), (0.25, 4)))
    assert fourth - none == pytest.approx((each - none) / 4)


@pytest.mark.broad
def test_three_turns_that_share_a_picture_save_two(rung: Any) -> None:
    """What one critic turn more costs, less its learning, is the picture."""
    fresh, shared = (
        {n: rung(critic_updates=n, critic_pictures=p).forwards for n in (1, 3)} for p in ("fresh", "shared")
    )
    picture = (fresh[3] - fresh[1] - (shared[3] - shared[1])) / 2
    assert picture > 1 and fresh[3] - shared[3] == pytest.approx(2 * picture)
    assert fresh[1] == pytest.approx(shared[1])


@pytest.mark.broad
def test_a_lora_for_each_step_takes_room_for_itself_and_for_no_second_base(rung: Any) -> None:
    one, two = (rung(student_steps=2, step_loras=several).peak.made_of for several in (False, True))
    assert two["base"] == one["base"]
    assert two["student@2"] == two["student"] == one["student"] and two["ema@2"] == one["ema"]
    assert two["student moments"] == 2 * one["student moments"]


@pytest.mark.broad
def test_a_head_takes_room_for_itself_and_its_term_forwards_where_it_is_asked(rung: Any) -> None:
    """float32: its factors, their gradients, AdamW's two moments or, without a first, one; no second base."""
    told = {"steps": 100, "gan_start": 0.5, "gan_ramp": 0.0}
    none, half = (rung("dmd2", **told, gan_weight=weight) for weight in (0.0, 1.0))
    whole = rung("dmd2", **{**told, "gan_start": 0.0}, gan_weight=1.0)
    plain, made_of = rung("dmd", steps=100).peak.made_of, half.peak.made_of
    channels = layouts.sd15().unet.config.block_out_channels[-1]
    head = 4 * (9 * channels * 256 + 256 + 2 * 256 + 256 + 1)
    assert made_of["head"] == head and made_of["head moments"] == head + 6 * 4  # the steps taken
    assert made_of["base"] == plain["base"]
    assert half.forwards - none.forwards == pytest.approx((whole.forwards - none.forwards) * 51 / 100, rel=1e-3)
    assert 1 < whole.forwards - none.forwards < 2.5
    once, twice, thrice = (rung("dmd2", **told, head_updates=count).forwards for count in (1, 2, 3))
    assert twice - once == pytest.approx(thrice - twice) and twice - once > 3
    punished = rung("dmd2", **told, head_penalty=1.0).forwards
    assert 1 < punished - once < 2


@pytest.mark.broad
def test_a_snapshot_that_is_the_teacher_takes_room_for_itself(rung: Any) -> None:
    none, one = (rung("disback", critic_warm_up=2, snapshots=2, backtrack=share) for share in (0.0, 0.5))
    assert one.peak.made_of["degraded teacher"] == one.peak.made_of["critic"] > 0
    assert "degraded teacher" not in none.peak.made_of
    assert none.forwards <= one.forwards <= 1.05 * none.forwards
