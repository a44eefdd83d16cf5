"""The script for a GPU in rehearsal: its parts run, wrong numbers and failures are told, and no part takes another."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))

import ops_right  # noqa: E402
import part  # noqa: E402
import run  # noqa: E402

TINY = part.Run(torch.device("cpu"), True)


def test_a_rehearsal_ends_well(tmp_path, capsys):
    assert run.main(["--tiny", "--out", str(tmp_path / "gpu.md")]) == 0
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out and text.startswith("# A rehearsal without a GPU")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for op in ("add_lora", "gated", "steered_attention"):
        assert sum(line.startswith(f"| {op} | reference | ") and line.endswith(" works |") for line in rows) == 3
        assert sum(line.startswith(f"| {op} | ") and " | written out | " in line for line in rows) >= 1
    assert torch.__version__ in text and "Not run" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_card_it_says_so(tmp_path, capsys):
    assert run.main(["--out", str(tmp_path / "gpu.md")]) == 2
    assert "torch sees no NVIDIA card" in capsys.readouterr().err and not (tmp_path / "gpu.md").exists()


def test_a_wrong_op_is_found(monkeypatch):
    op = ops_right.OPS[1]
    right = op.reference["forward"]
    monkeypatch.setattr(op, "reference", {**op.reference, "forward": lambda *given: (off(right(*given)[0]),)})

    def off(found):
        return found * 1.05 if found.dtype != torch.float64 else found

    table = ops_right.measure(TINY)
    assert not table.good and [row[-1] for row in table.rows if row[:2] == ("gated", "reference")] == ["WRONG"] * 3


def test_a_part_that_fails_is_told_and_the_others_run():
    def fails(_):
        raise RuntimeError("no such kernel\nand more")

    parts = [part.Part("bad", "Bad", fails), part.Part("good", "Good", lambda _: part.Table(("x",), [(0.5,)]))]
    text, good = run.report(TINY, parts, 8)
    assert not good and "| RuntimeError: no such kernel |" in text and "| 0.5 |" in text
    text, good = run.report(TINY, parts[1:], -1)
    assert not good and "Not run: no time was left." in text
