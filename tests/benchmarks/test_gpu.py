"""The script for a GPU in rehearsal: its parts run, wrong numbers and failures are told, and no part takes another."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
sys.path.append(str(SCRIPTS))

import ops_right  # noqa: E402
import page  # noqa: E402
import part  # noqa: E402
import run  # noqa: E402
import wheels  # noqa: E402

TINY = part.Run(torch.device("cpu"), True)


def rehearsed(folder: Path, *parts: str) -> tuple[int, str]:
    """The script's answer and its page, of some parts alone."""
    code = run.main(["--tiny", "--out", str(folder / "gpu.md"), "--only", *parts])
    return code, (folder / "gpu.md").read_text(encoding="utf-8")


def cells(text: str, first: str) -> list[list[str]]:
    """Rows of the page that begin with ``first``."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]
    return [row for row in rows if row[0].startswith(first)]


def test_a_rehearsal_of_the_ops_ends_well(tmp_path, capsys):
    code, text = rehearsed(tmp_path, "ops-right", "ops-speed")
    assert code == 0 and text in capsys.readouterr().out and text.startswith("# A rehearsal without a GPU")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for op in ops_right.OPS:
        assert sum(line.startswith(f"| {op.name} | reference | ") and line.endswith(" works |") for line in rows) == 3
        assert sum(line.startswith(f"| {op.name} | ") and " | written out | " in line for line in rows) >= 1
    assert torch.__version__ in text and "not measured" not in text.lower()


@pytest.mark.slow
@pytest.mark.broad
def test_two_steps_are_right_in_every_storage(tmp_path):
    code, text = rehearsed(tmp_path, "steps-right")
    for stored in ("float32", "bfloat16", "float8", "nf4"):
        if stored == "nf4" and not part.attempted(lambda: __import__("bitsandbytes"))[1]:
            continue
        (row,) = cells(text, stored)
        assert row[-1] == "right" and min(map(float, row[1:5])) > 0.97
    assert code == 0 or "nf4 |" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param(
            "plan",
            {"tiny 32x32, rank 8, batch 4": "micro-batch 4", "the same, batch 4, of 8 GB": "micro-batch 4"},
            marks=pytest.mark.broad,
        ),
        pytest.param(
            "peers",
            {"small 32, batch 1: one base, roles": "", "small 32, batch 1: three": "", "FastGen": "not carried"},
            marks=pytest.mark.broad,
        ),
        ("fast", {"tiny 32: bare network": "", "tiny 32: fast, eager": ""}),
        pytest.param("negatives", {"toy sd15": "plain"}, marks=pytest.mark.broad),
    ],
)
def test_the_other_parts_are_rehearsed(name, rows, tmp_path):
    code, text = rehearsed(tmp_path, name)
    assert code == 0, text
    for title, second in rows.items():
        (row, *_) = cells(text, title)
        assert row[1].startswith(second) and (row[1] != "" or "failed" not in text)


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


# -- what may go wrong -------------------------------------------------------------------------------------------------


def fails(_):
    raise RuntimeError("no such kernel\nand more")


def paged(parts, folder: Path, minutes: float = 8) -> page.Page:
    made = page.Page(TINY, folder / "gpu.md", folder)
    made.measure(parts, minutes)
    assert (folder / "gpu.md").read_text(encoding="utf-8") == made.text
    return made


GOOD = part.Part("good", "Good", lambda _: part.Table(("x",), [(0.5,)]))


def test_a_part_that_fails_is_told_and_the_others_run(tmp_path):
    found = paged([part.Part("bad", "Bad", fails), GOOD], tmp_path)
    assert not found.good and "| RuntimeError: no such kernel |" in found.text and "| 0.5 |" in found.text
    assert paged([GOOD], tmp_path).good


def test_a_part_takes_its_share_of_the_time(tmp_path):
    """A part after those that have taken more than theirs is not run, and is told."""
    found = paged([GOOD], tmp_path, -1)
    assert not found.good and "Not run: no time was left." in found.text
    seen = []

    def note(given: part.Run) -> part.Table:
        seen.append(given.left)
        return part.Table(("x",), [])

    paged([part.Part("a", "A", note, 30), part.Part("b", "B", note, 90)], tmp_path, 2)
    assert 20 < seen[0] <= 30 and 100 < seen[1] <= 120


def test_a_row_that_fails_or_has_no_time_is_told_and_the_others_are_measured():
    def full():
        raise torch.OutOfMemoryError("2 GiB")

    run = part.Run(torch.device("cpu"), False, time.monotonic() + 60)
    cases = [
        part.Case("full", full),
        part.Case("bad", lambda: fails(0)),
        part.Case("long", lambda: [1.0], 100),
        part.Case("good", lambda: [1.0, 2.0]),
    ]
    found = part.table_of(run, ("a", "b", "c"), cases)
    told = [row[1] for row in found.rows]
    assert told[:2] == ["out of memory", "RuntimeError: no such kernel"] and told[3] == 1.0
    assert told[2].startswith("not measured: ") and told[2].endswith(" s were left of 100")
    assert not found.good and all(len(row) == 3 for row in found.rows)


@pytest.mark.broad
def test_parts_after_a_lost_card_run_in_a_process_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "dead", lambda device: True)
    found = paged([GOOD, run.PARTS[0]], tmp_path)
    assert not found.good and "The card was lost in that part" in found.text
    assert "| gated | reference | float32 |" in found.text and found.text.count("## Every op against float64") == 1


@pytest.mark.broad
def test_it_ends_when_the_time_is_over_whatever_it_is_in(tmp_path):
    """A kernel that never returns, here a part that sleeps."""
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "import run, part\n"
        "run.PARTS = (part.Part('long', 'Long', lambda _: time.sleep(600)),)\n"
        "sys.exit(run.main(['--tiny', '--minutes', '0.02', '--out', sys.argv[2]]))"
    )
    words = [sys.executable, "-c", script, str(SCRIPTS), str(tmp_path / "gpu.md")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert "## Long" in done.stdout and "Cut off: the time was over." in (tmp_path / "gpu.md").read_text("utf-8")


# -- what is carried ---------------------------------------------------------------------------------------------------


def test_wheels_beside_the_script_are_there_behind_what_the_machine_has(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with zipfile.ZipFile(tmp_path / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_to_the_card/__init__.py", "here = 1")
        wheel.writestr("torch/__init__.py", "raise ImportError")
    assert wheels.unpack(tmp_path, tmp_path / "unpacked") == ["carried-1-py3-none-any.whl"]
    assert importlib.import_module("carried_to_the_card").here == 1 and sys.path[-1] == str(tmp_path / "unpacked")
    assert wheels.unpack(tmp_path / "none", tmp_path / "nothing") == []


def test_of_bitsandbytes_one_library_is_carried(tmp_path):
    names = [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda126", "cuda130", "rocm70", "xpu2025")]
    path = tmp_path / "bitsandbytes-0.wheel.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name in (*names, "bitsandbytes/__init__.py"):
            wheel.writestr(name, name)
    with zipfile.ZipFile(wheels.slim(path, "13.0")) as wheel:
        assert sorted(wheel.namelist()) == ["bitsandbytes/__init__.py", names[0], names[2]]
        assert wheel.read(names[2]).decode() == names[2]
    with pytest.raises(ValueError, match="has no libbitsandbytes_cuda118.so: it has 130"):
        wheels.slim(path, "11.8")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
