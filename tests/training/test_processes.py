"""Two processes that train one run: as one process with the whole batch, resumed to the bit, and one of them killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onestep.core.errors import OneStepError
from onestep.training.engine import processes

RUNNER = Path(__file__).parents[1] / "support" / "process_runner.py"
SECONDS = 240
ADDED = ("distance", "regression", "critic", "anchor")
"""Numbers of the metrics that are means over the batch, or of the whole student."""


def free_port() -> int:
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        return int(there.getsockname()[1])


def started(count: int, folder: Path, *arguments: Any) -> list[subprocess.Popen[str]]:
    """The processes of a run in ``folder``, as torchrun would start them."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    command = [sys.executable, str(RUNNER), str(folder), *map(str, arguments)]
    return [
        subprocess.Popen(command, env=os.environ | meet | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(count)
    ]


def ended(found: list[subprocess.Popen[str]]) -> list[int]:
    """Their exit codes; where one has failed, the others are ended after a while, as torchrun ends them."""
    told = [process.communicate(timeout=SECONDS)[1] for process in found]
    codes = [process.returncode for process in found]
    print(*(text[-3000:] for text, code in zip(told, codes, strict=True) if code), sep="\n")
    return codes


def trained(count: int, folder: Path, *arguments: Any) -> dict[str, torch.Tensor]:
    assert ended(started(count, folder, *arguments)) == [0] * count
    return load_file(folder / "result.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    """A folder with a run by two processes in `two`, and the same by one in `one`."""
    base = tmp_path_factory.mktemp("processes")
    trained(2, base / "two", "dmd", 3)
    trained(1, base / "one", "dmd", 3)
    return base


def test_two_learn_what_one_learns(base: Path) -> None:
    """To float32's rounding: the sums of a batch are of halves. What is written is the same, once."""
    one, two = (load_file(base / name / "result.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    moved = max(float(value.abs().max()) for name, value in one.items() if "lora_B" in name or "lora_up" in name)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-3 * moved if value.ndim > 1 else 0)
    files = [{str(path.relative_to(base / name)) for path in (base / name).rglob("*")} for name in ("one", "two")]
    assert files[0] == files[1]


def test_losses_and_gradients_are_the_whole_batchs(base: Path) -> None:
    """Adam forgives a gradient that is twice too large; its norm does not."""
    one, two = ((base / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two"))
    assert len(one) == len(two) > 3
    for mine, theirs in zip(map(json.loads, one), map(json.loads, two), strict=True):
        # a deviation over rows is of each process's own
        numbers = {name for name in mine if name in ADDED or name.endswith("_norm")}
        assert mine.keys() == theirs.keys() and len(numbers) > (1 if mine["update"] else 0)
        for name in numbers:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-5), (mine["update"], name)


def test_resumed_by_as_many_to_the_bit(base: Path) -> None:
    """One of the processes is killed: the state is whole, and the run goes on as if nothing had been."""
    found = started(2, base / "torn", "dmd", 3, 1, 3)
    assert found[1].wait(SECONDS) != 0
    try:
        found[0].wait(30)
    except subprocess.TimeoutExpired:
        found[0].kill()
    assert not (base / "torn" / "result.safetensors").exists()
    assert [path for path in (base / "torn").glob("state-*") if (path / "complete").is_file()]
    again = trained(2, base / "torn", "dmd", 3)
    for name, value in load_file(base / "two" / "result.safetensors").items():
        assert torch.equal(again[name], value)


def test_another_number_goes_on(base: Path) -> None:
    before = load_file(base / "one" / "result.safetensors")
    after = trained(2, base / "one", "dmd", 5)
    assert after.keys() == before.keys() and any(not torch.equal(after[name], before[name]) for name in before)


def test_one_may_have_more_micro_batches_than_the_other(tmp_path: Path) -> None:
    """Five rows, one at a time: two by the first process, three by the second."""
    one = trained(1, tmp_path / "one", "dmd", 2, -1, 0, 5, 5)
    two = trained(2, tmp_path / "two", "dmd", 2, -1, 0, 5, 5)
    moved = max(float(value.abs().max()) for value in one.values())
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-3 * moved if value.ndim > 1 else 0)


def test_one_process_alone_is_all(tmp_path: Path) -> None:
    assert processes.count() == 1 and processes.is_first() and list(processes.own(5)) == [0, 1, 2, 3, 4]
    assert processes.same({"a": [1, None]}) == {"a": [1, None]} and processes.sum_numbers({"a": 1.0}) == {"a": 1.0}


def test_rows_are_shared_out_whole(monkeypatch: Any) -> None:
    monkeypatch.setattr(processes, "count", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        parts.append(list(processes.own(8)))
    assert sum(parts, []) == list(range(8)) and all(parts)
    with pytest.raises(OneStepError, match="batch is 2 on 3 processes"):
        processes.own(2)
