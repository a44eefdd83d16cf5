"""The benchmark of what steering costs: it runs in both hosts, compares equals with equals, and its interval is one."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import comfy_support
import pytest
import torch
from narrowed import narrowed

pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import cost  # noqa: E402
import cost_diffusers  # noqa: E402

SINGLE = ("plain", "NASA", "NAG", "VSF", "PERP", "AGD")
TOYS = ("toy-sd15", "toy-sd3", "toy-flux", "toy-flux2", "toy-chroma", "toy-z_image", "toy-krea2")
TOYS += ("toy-qwen", "toy-lumina2", "toy-anima", "toy-wan", "toy-pixart")
JOINT = ("toy-sd3", "toy-flux", "toy-flux2", "toy-chroma", "toy-qwen")


def found_by(name: str) -> dict[str, Any]:
    """The first picture's prediction of every row of a toy."""
    with torch.no_grad():
        makers = cost_diffusers.makers(cost.CASES[name], torch.device("cpu"), torch.float32, "")
        return {row: make()()[1][:1].double() for row, make in makers.items()}


@pytest.mark.parametrize("name", narrowed(TOYS, *list(TOYS)[::3]))
def test_rows_act_and_the_doubled_form_is_the_same_steering(name: str) -> None:
    found = found_by(name)
    scale = float(found["plain"].std())
    away = {row: float((x - found["plain"]).abs().max()) / scale for row, x in found.items()}
    assert set(found) == {*SINGLE, "CFG"} | ({"doubled form"} if name in JOINT else set())
    assert away["CFG"] < 1e-5, "both halves of a batch for CFG are plain rows"
    assert min(away[row] for row in SINGLE[1:]) > 1e-4
    if "doubled form" in found:
        assert float((found["doubled form"] - found["NAG"]).abs().max()) < 1e-4 * away["NAG"] * scale


@pytest.mark.broad
def test_a_table_and_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    wanted = ["--networks", "toy-sd3", "--rounds", "2", "--rows", "NAG", "CFG", "--compile", "eager"]
    cost.main([*wanted, "--out", str(tmp_path / "cost.md")])
    torch.set_num_threads(threads)
    written = (tmp_path / "cost.md").read_text("utf-8")
    assert written.strip() == capsys.readouterr().out.strip()
    rows = [line.split(" | ") for line in written.splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows] == ["row", "plain", "NAG", "CFG"]
    assert rows[1][1] == "1.000" and float(rows[2][1]) > 0 and [row[3] for row in rows[1:]] == ["2", "2", "1"]


@pytest.mark.parametrize("rounds", [1, 3, 5, 6, 9, 12])
def test_an_interval_misses_the_median_seldom(rounds: int) -> None:
    """Each value lies above or below the true median with equal chance: all 2^n ways are counted."""
    low, high = cost.interval([float(n) for n in range(rounds)])
    ways = [sum(below) for below in itertools.product((0, 1), repeat=rounds)]

    def missed(low: float, high: float) -> float:
        return sum(below <= low or below > high for below in ways) / len(ways)

    assert (missed(low, high) <= 0.05) == (rounds >= 6) and low == rounds - 1 - high
    if low + 1 < high - 1:
        assert missed(low + 1, high - 1) > 0.05, "the next narrower one misses too often"


def test_ratios_are_of_one_round() -> None:
    plain, row = cost.Times({0: 1.0, 1: 2.0, 2: 4.0}), cost.Times({0: 1.5, 2: 5.0})
    assert cost.ratios(row, plain) == [1.25, 1.5]


@pytest.mark.broad
@pytest.mark.comfy
def test_rows_in_comfyui() -> None:
    comfy = comfy_support.find_comfy()
    if isinstance(comfy, str):
        pytest.skip(comfy)
    printed = comfy.run_script(ROOT / "tests" / "nodes" / "inside" / "cost_rows.py")
    told = json.loads(printed.strip().splitlines()[-1])
    assert told.keys() == {"toy-sd15", "toy-sd3", "toy-flux", "toy-flux2"}, "those that ComfyUI's rows are made of"
    for name, apart in told.items():
        assert {*SINGLE, "CFG"} < set(apart)
        assert min(apart[row] for row in ("plain", "NASA", "VSF", "PERP", "AGD")) > 1e-4, name
    for name in told.keys() & set(JOINT):
        assert told[name]["doubled form"] < 1e-4 * told[name]["plain"]
