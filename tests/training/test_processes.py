"""Two processes that train one run: as one process with the whole batch, resumed to the bit, and one of them struck."""

from __future__ import annotations

import json
import os
import socket
import sys
from functools import cache
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from narrowed import narrowed
from own_pictures import pictures_in
from safetensors.torch import load_file
from whole_runs import newest

from onestep.core.errors import OneStepError
from onestep.training.engine import processes

RUNNER = Path(__file__).parents[1] / "support" / "process_runner.py"
SECONDS = 240
ADDED = ("distance", "regression", "critic", "anchor")
FULL, CANCEL = ("full", 8, "NotSaved"), ("cancel", 6, "KeyboardInterrupt")
"""Numbers of the metrics that are means over the batch, or of the whole student."""
Found = dict[str, Any]


def free_port() -> int:
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        return int(there.getsockname()[1])


def a_run(folder: Path, method: str = "dmd", steps: int = 3, **settings: Any) -> Found:
    return {"folder": str(folder), "method": method, "steps": steps, "settings": settings}


def struck(run: Found, rank: int, where: str, after: int = 0) -> Found:
    """``run``, in which that befalls one process."""
    return run | {"fault": {"rank": rank, "where": where, "after": after}}


def processes_of(count: int, *runs: Found) -> list[tuple[int, list[Found]]]:
    """Exit code of each process of ``runs``, started as torchrun starts them, and what each run came to in it."""
    meet = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    environments = [meet | {"RANK": str(rank)} for rank in range(count)]
    ended = runner().run([*map(json.dumps, runs)], environments, SECONDS)
    for process in ended:
        print(process.stderr[-2000:])
    return [(process.returncode, [json.loads(line) for line in process.stdout.splitlines()]) for process in ended]


@cache
def runner() -> forks.Forks:
    return forks.Forks([sys.executable, str(RUNNER), "forks"], dict(os.environ))


def trained(count: int, run: Found) -> dict[str, torch.Tensor]:
    assert [code for code, _ in processes_of(count, run)] == [0] * count
    return load_file(Path(run["folder"]) / "result.safetensors")


def assert_near(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """To float32's rounding: the sums of a batch are of parts of it."""
    assert one.keys() == two.keys()
    moved = max(float(value.abs().max()) for name, value in one.items() if "lora_B" in name or "lora_up" in name)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-3 * moved if value.ndim > 1 else 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    """A folder with a run by two processes in `two`, and the same by one in `one`."""
    base: Path = tmp_path_factory.mktemp("processes")
    trained(2, a_run(base / "two"))
    trained(1, a_run(base / "one"))
    return base


def test_two_learn_what_one_learns(base: Path) -> None:
    """What is written is the same, once."""
    assert_near(*(load_file(base / name / "result.safetensors") for name in ("one", "two")))
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


@pytest.mark.broad
def test_resumed_by_as_many_to_the_bit(base: Path) -> None:
    """One of the processes is killed: the other says so and ends, the state is whole, and the run goes on as if nothing
    had been."""
    (code, found), (killed, _) = processes_of(2, struck(a_run(base / "torn"), 1, "update", 3))
    assert killed < 0 and code == 0 and found[0]["error"] == "Alone", found
    assert "another process of this run has ended" in found[0]["says"] and "--resume" in found[0]["says"]
    assert not (base / "torn" / "result.safetensors").exists()
    assert [path for path in (base / "torn").glob("state-*") if (path / "complete").is_file()]
    again = trained(2, a_run(base / "torn"))
    for name, value in load_file(base / "two" / "result.safetensors").items():
        assert torch.equal(again[name], value)


@pytest.mark.parametrize(("rank", "where", "after"), narrowed([(1, "pairs", 0), (0, "saving", 3), (0, "end", 0)]))
def test_wherever_one_dies_the_other_ends_and_the_run_goes_on(
    base: Path, tmp_path: Path, rank: int, where: str, after: int
) -> None:
    ended = processes_of(2, struck(a_run(tmp_path / "torn"), rank, where, after))
    assert ended[rank][0] < 0 and ended[1 - rank][1][0]["error"] == "Alone"
    again = trained(2, a_run(tmp_path / "torn"))
    for name, value in load_file(base / "two" / "result.safetensors").items():
        assert torch.equal(again[name], value)


def test_another_number_goes_on(base: Path) -> None:
    before = load_file(base / "one" / "result.safetensors")
    after = trained(2, a_run(base / "one", steps=5))
    assert after.keys() == before.keys() and any(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.broad
def test_one_may_have_more_micro_batches_than_the_other(tmp_path: Path) -> None:
    """Five rows, one at a time: two by the first process, three by the second."""
    parts = {"batch": 5, "accumulation": 5}
    assert_near(*(trained(count, a_run(tmp_path / str(count), steps=2, **parts)) for count in (1, 2)))


def test_what_befalls_one_process_is_no_other_run(base: Path, tmp_path: Path) -> None:
    """Memory runs out in one of them, as it learns and as it makes pairs; one has a gradient that is no number; one
    stops the run; two are not of one run, or on one GPU; the first is asked to save and draw: they end each together,
    with the same student, and wait for nobody."""
    runs = [
        struck(a_run(tmp_path / "memory"), 1, "memory", 5),
        struck(a_run(tmp_path / "memory in pairs"), 1, "memory in pairs", 1),
        struck(a_run(tmp_path / "nan"), 1, "nan", 5),
        struck(a_run(tmp_path / "stuck", patience=1), 0, "nan", 5),
        struck(a_run(tmp_path / "finished"), 0, "finish", 3),
        struck(a_run(tmp_path / "settings"), 1, "settings"),
        struck(a_run(tmp_path / "base"), 1, "base"),
        struck(a_run(tmp_path / "one card"), 1, "one card"),
        struck(a_run(tmp_path / "asked", save_every=100), 0, "save and draw", 3),
        a_run(tmp_path / "vsd", "vsd"),
        a_run(tmp_path / "guidance", "guidance-lora"),
    ]
    (code, first), (other, second) = processes_of(2, *runs)
    assert code == other == 0 and len(first) == len(second) == len(runs)
    for run, mine, theirs in zip(runs, first, second, strict=True):
        assert mine["factors"] == theirs["factors"], run
        assert mine.get("says") == theirs.get("says") and mine.get("updates") == theirs.get("updates"), run
    two = load_file(base / "two" / "result.safetensors")
    for name in ("memory", "memory in pairs"):
        assert_near(two, load_file(tmp_path / name / "result.safetensors"))
    metrics = [json.loads(line) for line in (tmp_path / "nan" / "metrics.jsonl").read_text().splitlines()]
    assert sum(None in line.values() for line in metrics) == 1
    assert first[3]["error"] == "Stopped" and first[4]["updates"] == 3
    for found, folder in ((first[5], "settings"), (first[6], "base")):
        assert f"have not the same {folder}" in found["says"] and not (tmp_path / folder).exists()
    assert "processes 0 and 1 of this run have one GPU between them" in first[7]["says"]
    assert not (tmp_path / "one card").exists()
    assert_saved_and_drawn(tmp_path / "asked", first[8], second[8], two)


TERM = {"gan_weight": 1.0, "gan_start": 0.0, "gan_ramp": 0.0}
HEADS: dict[str, Found] = {
    "dmd2": TERM,
    "f-distill": TERM,
    "ladd": {"warm_start": 1, "head_warm_up": 1, "head_blocks": 2},
    "mmd": {"warm_start": 1, "head_blocks": 2, "batch": 16},
}


@pytest.mark.broad
@pytest.mark.parametrize("method", list(HEADS))
def test_a_heads_student_is_one_processes(method: str, tmp_path: Path) -> None:
    """Its gradients are summed as the others' are; f-distill's means and mmd's features are of both processes'."""
    runs = [a_run(tmp_path / str(count), method, 2, **HEADS[method]) for count in (1, 2)]
    assert_near(*(trained(count, run) for count, run in zip((1, 2), runs, strict=True)))
    heads = [load_file(newest(Path(run["folder"])) / "state.safetensors") for run in runs]
    for name in (name for name in heads[0] if name.startswith(("head", "features"))):
        torch.testing.assert_close(heads[1][name], heads[0][name], rtol=2e-3, atol=1e-5)
    (code, found), (other, theirs) = processes_of(
        2, struck(a_run(tmp_path / "torn", method, 2, **HEADS[method]), 1, "update", 2)
    )
    assert code == 0 and other < 0
    again = trained(2, a_run(tmp_path / "torn", method, 2, **HEADS[method]))
    assert all(
        torch.equal(again[name], value) for name, value in load_file(tmp_path / "2" / "result.safetensors").items()
    )


@pytest.mark.parametrize(
    ("name", "rank", "here", "device"),
    [
        (None, 1, 2, "cuda:1"),
        ("cuda", 0, 2, "cuda:0"),
        ("cpu", 3, 4, "cpu"),
        ("xpu:1", 0, 2, "xpu:1"),
        ("cuda:1", 0, 1, "cuda:1"),  # one process on each machine
    ],
)
def test_each_process_of_a_machine_takes_its_own_gpu(
    name: str | None, rank: int, here: int, device: str, monkeypatch: Any
) -> None:
    as_started(monkeypatch, rank, here)
    assert processes.own_device(name, cards=2) == device
    assert processes.own_device(name, cards=0) == name, "what is not there is refused where it is opened"


@pytest.mark.parametrize("name", ["cuda:0", "cuda:1"])
def test_one_gpu_for_several_processes_is_refused(name: str, monkeypatch: Any) -> None:
    as_started(monkeypatch, 0, 2)
    with pytest.raises(OneStepError, match=f"--device {name} is one GPU for the 2 processes .* CUDA_VISIBLE_DEVICES"):
        processes.own_device(name, cards=4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")  # not told how many are here, it is taken to be all
    with pytest.raises(OneStepError, match=f"--device {name} is one GPU for the 8 processes"):
        processes.own_device(name, cards=4)


def test_more_processes_than_gpus_are_refused(monkeypatch: Any) -> None:
    as_started(monkeypatch, 2, 3)
    with pytest.raises(OneStepError, match="2 GPUs, fewer than its processes"):
        processes.own_device(None, cards=2)


def as_started(monkeypatch: Any, rank: int, here: int) -> None:
    """The environment that torchrun makes: ``here`` of eight processes are on this machine."""
    for name, value in {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": here, "WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))


def assert_saved_and_drawn(folder: Path, first: Found, second: Found, plain: dict[str, torch.Tensor]) -> None:
    """After update 3 the first process wrote a state, what had been learnt, a picture; the run is as it was."""
    assert "state-3" in {path.name for path in folder.glob("state-*")}
    assert first["saved"] == list(range(4, first["updates"] + 1)) and second["saved"] == []
    assert [path.name for path in (folder / "previews").iterdir()] == ["000003.png"]
    assert not (folder / "partial.safetensors").exists()
    result = load_file(folder / "result.safetensors")
    assert result.keys() == plain.keys() and all(torch.equal(result[name], plain[name]) for name in plain)


@pytest.mark.parametrize(("where", "after", "error"), narrowed([FULL, CANCEL], CANCEL))
def test_the_first_leaves_and_nobody_waits(where: str, after: int, error: str, base: Path, tmp_path: Path) -> None:
    """A full disk; a person who cancels. The run goes on to the bit."""
    (_, first), (_, second) = processes_of(2, struck(a_run(tmp_path / "left"), 0, where, after))
    assert first[0]["error"] == error and second[0]["error"] == "Alone"
    again = trained(2, a_run(tmp_path / "left"))
    for name, value in load_file(base / "two" / "result.safetensors").items():
        assert torch.equal(again[name], value)


def test_a_start_that_names_no_meeting_place_is_refused(monkeypatch: Any) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(OneStepError, match="WORLD_SIZE is 2, but the processes do not find each other"),
        processes.joined(),
    ):
        pass


def test_one_process_alone_is_all(tmp_path: Path) -> None:
    assert processes.count() == 1 and processes.is_first() and list(processes.own(5)) == [0, 1, 2, 3, 4]
    assert processes.same({"a": [1, None]}) == {"a": [1, None]} and processes.sum_numbers({"a": 1.0}) == {"a": 1.0}
    assert torch.equal(processes.sum_tensor(torch.ones(2)), torch.ones(2))


def test_rows_are_shared_out_whole(monkeypatch: Any) -> None:
    monkeypatch.setattr(processes, "count", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        parts.append(list(processes.own(8)))
    assert sum(parts, []) == list(range(8)) and all(parts)
    with pytest.raises(OneStepError, match="batch is 2 on 3 processes"):
        processes.own(2)


@pytest.mark.broad
def test_pictures_are_read_by_the_first_alone(tmp_path: Path) -> None:
    """The watch, which only the first process has, asks for nothing that the others would have to wait for."""
    own = pictures_in(tmp_path / "own") | {"student_steps": 2}
    one, two = (trained(count, a_run(tmp_path / f"{count}", "tune", **own)) for count in (1, 2))
    assert_near(one, two)
