"""Runs whose base is streamed end as those of a resident one, to the bit: whole, cut and resumed, short of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from every_method import host_of, short
from narrowed import narrowed
from small_host import SmallHost, small
from whole_runs import Cancelled, at_call, factors, left, run

from onestep.core.tensor_file import read_tensors
from onestep.training.methods import METHODS

FEW: dict[str, Any] = {"steps": 3, "preview_every": 2, "watch_every": 2}
DMD: dict[str, Any] = {"anchor": 0.5, "warm_start": 2, "critic_warm_up": 1}


def same(one: Path, other: Path) -> None:
    """All that two runs leave, but for the setting itself in the file's header."""
    found, wanted = left(one), left(other)
    for told in (found, wanted):
        told["files"] = {name: value for name, value in told["files"].items() if not name.startswith("result")}
    assert found == wanted
    assert factors(one / "result.safetensors") == factors(other / "result.safetensors")


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", narrowed([*METHODS], "dmd"))
def test_a_streamed_run_is_the_resident_one(tmp_path: Path, method: str, checkpointing: bool) -> None:
    """Its state, its metrics, what its watch saw, its previews, its LoRA. Streamed blocks are checkpointed in any
    case."""
    changes, found = FEW | short(method, tmp_path), {}
    for streaming in ("off", "on"):
        settings = small(**changes, streaming=streaming, checkpointing=checkpointing or streaming == "on")
        host = host_of(method)
        found[streaming] = run(tmp_path / streaming, settings, host=host)
        assert not host.streamed and all(not p.is_meta for p in host.network.parameters())
    if checkpointing:
        same(tmp_path / "on", tmp_path / "off")
    assert found["on"].check == found["off"].check
    assert found["on"].preview is not None


@pytest.mark.parametrize("then", narrowed(["on", "off", "auto"], "off"))
def test_cancelled_and_continued(tmp_path: Path, then: str) -> None:
    """In the middle of an update; streamed or not from there on, which is no other run."""
    whole = run(tmp_path / "whole", small(**FEW, **DMD, streaming="off"))
    for poll in (9, 14):
        folder, host = tmp_path / f"cut {poll}", SmallHost()
        host.on_poll = at_call(poll, Cancelled())
        with pytest.raises(Cancelled):
            run(folder, small(**FEW, **DMD, streaming="on"), host=host)
        assert not host.streamed
        found = run(folder, small(**FEW, **DMD, streaming=then), existing="continue")
        assert found.updates == whole.updates
        same(folder, tmp_path / "whole")


def test_one_that_kept_its_activations_goes_on_streamed(tmp_path: Path) -> None:
    """Its state says that nothing was computed again; a streamed network computes all blocks again."""
    how = FEW | DMD | {"checkpointing": False}
    run(tmp_path / "whole", small(**how))
    host = SmallHost()
    host.on_poll = at_call(9, Cancelled())
    with pytest.raises(Cancelled):
        run(tmp_path / "cut", small(**how, streaming="off"), host=host)
    run(tmp_path / "cut", small(**how, streaming="on"), existing="continue")
    for file in ("result.safetensors", "state-6/state.safetensors"):
        assert factors(tmp_path / "cut" / file) == factors(tmp_path / "whole" / file)


@pytest.mark.parametrize("at", narrowed([3, 4], 4))
def test_memory_that_runs_out_in_a_streamed_run(tmp_path: Path, at: int) -> None:
    """Within a block of a forward, or of its recomputation: smaller micro-batches, as in a resident run."""
    found = {}
    for streaming in ("on", "off"):
        host, calls = SmallHost(), iter(range(10**9))

        def fail(layer: Any, given: Any, calls: Any = calls) -> None:
            if len(given[0]) > 2 and torch.is_grad_enabled() and next(calls) == at:
                raise torch.OutOfMemoryError("injected")

        host.blocks[1].conv.register_forward_pre_hook(fail)
        settings = small(method="regression", **FEW, streaming=streaming)
        found[streaming] = run(tmp_path / streaming, settings, host=host)
    assert any("out of memory" in note for note in found["on"].notes)
    same(tmp_path / "on", tmp_path / "off")


def test_a_state_of_a_streamed_run_holds_no_weights(tmp_path: Path) -> None:
    states = {}
    for streaming in ("on", "off"):
        run(tmp_path / streaming, small(method="regression", **FEW, streaming=streaming))
        states[streaming] = read_tensors(tmp_path / streaming / "state-3" / "state.safetensors")
    assert states["on"].keys() == states["off"].keys()
