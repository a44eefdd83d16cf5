"""Runs whose network's blocks are compiled: the eager one's but for rounding, cut and continued to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import narrowed
from small_host import SmallHost, small
from whole_runs import Cancelled, at_call, factors, left, run

from onestep.core.compiled import compiled_blocks
from onestep.core.tensor_file import read_tensors
from onestep.training.engine import setup

FEW: dict[str, Any] = {"method": "regression", "steps": 3, "preview_every": 2, "watch_every": 2}
DMD: dict[str, Any] = FEW | {"method": "dmd", "anchor": 0.5, "warm_start": 2, "critic_warm_up": 1}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def by_aot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A back end that needs no compiler of C, and has a graph for backward of its own."""
    monkeypatch.setattr(setup, "compiled_blocks", partial(compiled_blocks, backend="aot_eager"))


def near(one: Path, other: Path) -> None:
    found, right = (read_tensors(folder / "result.safetensors") for folder in (one, other))
    assert found.keys() == right.keys()
    for name, value in right.items():
        atol = max(
            1e-6, 1e-3 * float(value.abs().max())
        )  # a step of Adam is as long for a gradient that nearly vanishes
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol)


def cut_and_continued(tmp_path: Path, poll: int, how: dict[str, Any]) -> None:
    """As from one program to the next: what was compiled is forgotten between the two."""
    whole, cut = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
    run(whole, small(**how, compile_blocks=True))
    torch.compiler.reset()
    host = SmallHost()
    host.on_poll = at_call(poll, Cancelled())
    with pytest.raises(Cancelled):
        run(cut, small(**how, compile_blocks=True), host=host)
    assert all("forward" not in vars(block) for block in host.blocks)
    torch.compiler.reset()
    found = run(cut, small(**how, compile_blocks=True), existing="continue")
    assert not any("compile" in note for note in found.notes)
    assert left(cut) == left(whole)


@pytest.mark.usefixtures("by_aot")
@pytest.mark.parametrize(
    "how",
    [
        {"steps": 2, "watch_every": 0, "preview_every": 0},
        # which the run that goes on meets in another order
        pytest.param({"sizes": "32x32,40x32", "seed": 3}, marks=pytest.mark.broad),
    ],
    ids=["one size", "two sizes"],
)
def test_a_compiled_run_is_the_eager_one_and_goes_on_to_the_bit(tmp_path: Path, how: dict[str, Any]) -> None:
    how = FEW | how
    cut_and_continued(tmp_path, 3, how)
    run(tmp_path / "eager", small(**how))
    near(tmp_path / "whole" / "run", tmp_path / "eager")


@pytest.mark.broad
@pytest.mark.parametrize("poll", [9, 14])
def test_by_torchs_own_back_end(tmp_path: Path, poll: int) -> None:
    cut_and_continued(tmp_path, poll, DMD)
    run(tmp_path / "eager", small(**DMD))
    near(tmp_path / "whole" / "run", tmp_path / "eager")


HEAD = {"steps": 2, "watch_every": 0, "preview_every": 0, "warm_start": 1, "critic_warm_up": 1}
TERM = {"gan_weight": 1.0, "gan_start": 0.0, "gan_ramp": 0.0}


@pytest.mark.broad
@pytest.mark.usefixtures("by_aot")
@pytest.mark.parametrize("method", ["dmd2", "f-distill", "ladd"])
def test_a_head_looks_at_compiled_blocks(tmp_path: Path, method: str) -> None:
    """What it sees are the blocks' outputs, which a hook takes outside their graphs."""
    how = {"method": method} | HEAD | ({"head_warm_up": 1, "head_blocks": 2} if method == "ladd" else TERM)
    how = {name: value for name, value in how.items() if not (method == "ladd" and name == "critic_warm_up")}
    cut_and_continued(tmp_path, 9, how)
    run(tmp_path / "eager", small(**how))
    near(tmp_path / "whole" / "run", tmp_path / "eager")


@pytest.mark.broad
@pytest.mark.usefixtures("by_aot")
def test_a_streamed_run_is_the_resident_one(tmp_path: Path) -> None:
    for how in ("on", "off"):
        run(tmp_path / how, small(**DMD, compile_blocks=True, streaming=how))
    assert factors(tmp_path / "on" / "result.safetensors") == factors(tmp_path / "off" / "result.safetensors")


def no_forward(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler here")


def no_backward(graph: Any, inputs: Any) -> Any:
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=no_forward)(graph, inputs)


@pytest.mark.parametrize("backend", [no_forward, no_backward])
@pytest.mark.parametrize("checkpointing", narrowed([True, False], True))
def test_one_that_cannot_be_compiled_is_the_eager_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Any, checkpointing: bool
) -> None:
    """To the bit, with a line in what the run says."""
    how = FEW | {"checkpointing": checkpointing, "watch_every": 0, "preview_every": 0}
    monkeypatch.setattr(setup, "compiled_blocks", partial(compiled_blocks, backend=backend))
    found = run(tmp_path / "compiled", small(**how, compile_blocks=True))
    run(tmp_path / "eager", small(**how))
    states = [read_tensors(tmp_path / name / "state-3" / "state.safetensors") for name in ("compiled", "eager")]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert sum("no compiler here" in note for note in found.notes) == 1
