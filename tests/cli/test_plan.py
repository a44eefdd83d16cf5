"""onestep plan: the table, the line of what a run does, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Command

MATCHED = ("--set", "method=dmd", "--set", "warm_start=0", "--set", "critic_warm_up=0")


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.broad
def test_a_large_card_takes_a_run_as_it_is_set(onestep: Command) -> None:
    said = onestep("plan", "tiny", "--card", "RTX 3060", "--preset", "Balanced", "--set", "checkpointing=false")
    assert said.code == 0
    assert "rank 64 on all layers; RTX 3060: 10.1 GiB for tensors" in said.out
    assert "fits: micro-batch 4, no checkpointing" in said.out and "A run fits as it is set" in said.out
    assert "Counted, not measured on a GPU" in said.out


def test_json_holds_every_part_in_bytes(onestep: Command, model: Path) -> None:
    said = onestep("plan", model, "--card", "24GB", "--method", "regression", "--set", "rank=8", "--json")
    told = json.loads(said.out)
    assert said.code == 0 and told["settings"]["rank"] == 8 and told["settings"]["sizes"] == "32x32"
    rung = told["rungs"][told["taken"]]
    firm = [bytes for part, bytes in rung["parts"].items() if part not in ("prompts", "decode")]
    assert rung["bytes"] == max(firm) == sum(rung["made_of"].values())
    assert {"base", "student", "ema"} <= rung["made_of"].keys()
    assert rung["seconds_an_update"] > 0


def test_without_a_card_the_run_is_counted_as_it_is_set(onestep: Command) -> None:
    said = onestep("plan", "tiny", "--method", "regression", "--set", "rank=4")
    assert said.code == 0 and "no card here" in said.out and "say --card to have it fitted" in said.out


@pytest.mark.broad
@pytest.mark.parametrize(
    ("layout", "base", "texts"),
    [
        ("z-image", 6.155e9, 4_022_468_096),
        ("anima", 1_956_405_248, 596_049_920 + 134_663_680),
        ("wan-1.3b", 1.419e9, 5_680_910_336),
        # and the places of its 64x64 tokens, a buffer
        ("pixart-sigma", 610_856_096 + 64 * 64 * 1152, 4_762_310_656),
    ],
)
def test_a_layout_is_counted_as_it_is_published(onestep: Command, layout: str, base: float, texts: int) -> None:
    """In bfloat16, the text encoder beside it while texts are encoded; at 512x512, to be short."""
    words = ("--set", "sizes=512x512", "--set", "rank=16", "--set", "steps=1", "--method", "regression", "--json")
    said = onestep("plan", layout, "--card", "24GB", *words)
    told = json.loads(said.out)
    assert said.code == 0 and told["taken"] is not None
    rung = told["rungs"][told["taken"]]
    assert rung["made_of"]["base"] == pytest.approx(2 * base, rel=0.002)
    assert rung["parts"]["prompts"] >= 2 * texts


@pytest.mark.broad
def test_sdxl_is_counted_at_a_size_that_is_no_square(onestep: Command) -> None:
    """Of as many pixels as a square of 1004: hardly less than at 1024x1024, and the same way either way round."""
    few = ("--method", "regression", "--set", "watch_every=0", "--set", "preview_every=0", "--json")
    found = {}
    for size in ("832x1216", "1216x832", "1024x1024"):
        said = onestep("plan", "sdxl", *few, "--set", f"sizes={size}")
        told = json.loads(said.out)
        assert said.code == 0 and told["settings"]["sizes"] == size
        found[size] = told["rungs"][0]["bytes"]
    assert found["832x1216"] == pytest.approx(found["1216x832"], rel=1e-3)
    assert 0.9 < found["832x1216"] / found["1024x1024"] < 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("plan", "sdxxl", "--card", "8GB"), "no model 'sdxxl'"),
        (("plan", "tiny", "--card", "a lot"), "no card 'a lot'"),
        (("plan", "tiny", "--card", "0GB"), "give its memory"),
        (("plan", "tiny", "--card", "30"), "no card '30'"),
        (("plan", "tiny", "--set", "rank"), "has no '='"),
        (("plan", "tiny", "--set", "rnk=3"), "no setting 'rnk'"),
        (("plan", "tiny", "--size", "33x32"), "multiples of"),
    ],
)
def test_bad_input_is_one_line(onestep: Command, words: tuple[str, ...], why: str) -> None:
    said = onestep(*words)
    assert said.code == 2 and said.out == "" and why in said.message


def test_a_folder_without_its_configurations_is_refused(onestep: Command, tmp_path: Path) -> None:
    said = onestep("plan", tmp_path)
    assert said.code == 2 and "has no configuration of its" in said.message
