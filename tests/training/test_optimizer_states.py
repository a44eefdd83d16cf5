"""An optimiser's moments come back to the bit, whatever it makes of its own state_dict."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_host import SmallHost, small
from torch import Tensor
from whole_runs import Cancelled, at_call, left, run

from onestep.core.errors import OneStepError
from onestep.core.tensor_file import read_tensors, write_tensors
from onestep.training.engine import optimizer as adam
from onestep.training.methods import settings_for

SHAPES = ((64, 72), (3, 5), (), (4097,), (16, 4, 3, 3))
"""Above and below the 4096 numbers from which on bitsandbytes keeps 8 bits; the third gets no gradient."""
KINDS = ("adamw", "adamw8bit", "muon")


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    """An optimiser's name. Without its package the test is skipped, by name."""
    name: str = request.param
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes, of the dev extra, is not installed: 8 bits untested")
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip(f"torch {torch.__version__} has no Muon (from 2.9 on)")
    return name


def parameters() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw).requires_grad_() for shape in SHAPES]


def made(tensors: list[Tensor], kind: str) -> torch.optim.Optimizer:
    return adam.make(tensors, settings_for(optimizer=kind, learning_rate=1e-2, weight_decay=0.01))


def steps(optimizer: torch.optim.Optimizer, tensors: list[Tensor], numbers: range) -> None:
    for number in numbers:
        draw = torch.Generator().manual_seed(100 + number)
        for tensor in tensors:
            tensor.grad = None if tensor.ndim == 0 else torch.randn(tensor.shape, generator=draw)
        optimizer.param_groups[0]["betas"] = (0.0 if number % 2 else 0.9, 0.99)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_moments_come_back_to_the_bit_through_a_file(kind: str, tmp_path: Path) -> None:
    through, ours = parameters(), parameters()
    whole, first = made(through, kind), made(ours, kind)
    steps(whole, through, range(3))
    steps(first, ours, range(3))
    tensors, numbers = adam.pack(first, "student")
    write_tensors(tmp_path / "state.safetensors", tensors)
    values = [tensor.detach().clone().requires_grad_() for tensor in ours]
    again = made(values, kind)
    adam.unpack(again, "student", read_tensors(tmp_path / "state.safetensors"), json.loads(json.dumps(numbers)))
    for mine, other in zip(values, ours, strict=True):
        for name, value in first.state[other].items():
            found = again.state[mine][name]
            assert found.dtype == value.dtype if isinstance(value, Tensor) else type(found) is type(value)
            assert torch.equal(found, value) if isinstance(value, Tensor) else found == value
    assert again.state.keys() <= set(values) and set(values[:2]) <= again.state.keys()
    steps(whole, through, range(3, 7))
    steps(again, values, range(3, 7))
    assert all(torch.equal(a, b) for a, b in zip(through, values, strict=True))


def test_eight_bits_are_eight_bits_in_the_state() -> None:
    """Not the dictionary that bitsandbytes makes of them in its own, and not widened."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, of the dev extra, is not installed: 8 bits untested")
    tensors = parameters()
    optimizer = made(tensors, "adamw8bit")
    steps(optimizer, tensors, range(1))
    packed, numbers = adam.pack(optimizer, "student")
    assert packed["student.0.state1"].dtype is packed["student.3.state2"].dtype is torch.uint8
    assert packed["student.1.state1"].dtype is torch.float32
    assert numbers == {f"student.{index}.step": 1 for index in (0, 1, 3, 4)}


class Wrapping(torch.optim.AdamW):
    """Its state_dict puts its moments away under a name of its own, as bitsandbytes' does from 0.49 on."""

    def state_dict(self) -> dict[str, Any]:
        told = super().state_dict()
        return {**told, "state": {index: {"__wrapped__": entries} for index, entries in told["state"].items()}}


def test_what_an_optimiser_makes_of_its_state_dict_does_not_matter() -> None:
    tensors, plain = parameters(), parameters()
    wrapping, usual = Wrapping(tensors, lr=1e-2), torch.optim.AdamW(plain, lr=1e-2)
    steps(wrapping, tensors, range(2))
    steps(usual, plain, range(2))
    packed, numbers = adam.pack(wrapping, "critic")
    assert numbers == {} and packed.keys() == adam.pack(usual, "critic")[0].keys()
    adam.unpack(usual, "critic", packed, numbers)
    steps(wrapping, tensors, range(2, 4))
    steps(usual, plain, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(tensors, plain, strict=True))


def test_states_that_earlier_versions_saved_still_load() -> None:
    """They were read from AdamW's state_dict, index by index."""
    tensors = parameters()
    optimizer = made(tensors, "adamw")
    steps(optimizer, tensors, range(2))
    entries = optimizer.state_dict()["state"].items()
    saved = {f"student.{index}.{name}": value.clone() for index, found in entries for name, value in found.items()}
    values = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    again = made(values, "adamw")
    steps(again, [torch.zeros_like(value) for value in values], range(1))
    adam.unpack(again, "student", {**saved, "critic.0.exp_avg": torch.zeros(1)}, {})
    steps(optimizer, tensors, range(2, 4))
    steps(again, values, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(tensors, values, strict=True))


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_a_run_goes_on_to_the_bit(kind: str, tmp_path: Path) -> None:
    """Cancelled twice, in the middle of updates. At rank 64 the convolutions' factors are large enough for 8 bits."""
    settings = small(optimizer=kind, rank=64, watch_every=0, preview_every=0, steps=3, warm_start=2)
    run(tmp_path / "whole", settings)
    for number in (4, 7):
        host = SmallHost()
        host.on_poll = at_call(number, Cancelled())
        with pytest.raises(Cancelled):
            run(tmp_path / "torn", settings, host=host, existing="continue")
        assert (tmp_path / "torn" / "partial.safetensors").is_file()
    run(tmp_path / "torn", settings, existing="continue")
    whole, torn = left(tmp_path / "whole"), left(tmp_path / "torn")
    assert {**whole, "files": None} == {**torn, "files": None}
    whole["files"].pop("result.safetensors"), torn["files"].pop("result.safetensors")
    assert whole["files"] == torn["files"]


def test_an_optimiser_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError):
        importlib.import_module("bitsandbytes")
    with pytest.raises(OneStepError, match="bitsandbytes cannot be imported"):
        adam.refuse_missing(settings_for(optimizer="adamw8bit"))
    adam.refuse_missing(settings_for())
