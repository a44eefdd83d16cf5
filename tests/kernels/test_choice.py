"""An implementation is used after its trial; one that fails, at whatever time, leaves the work to plain torch."""

from __future__ import annotations

import importlib.util
import logging
import sys

import pytest
import torch
from torch import Tensor

from onestep.kernels import choice
from onestep.kernels.choice import NotServedError, Op

CPU, FLOAT = torch.device("cpu"), torch.float32
CALLS: list[str] = []


def plain(x: Tensor) -> tuple[Tensor]:
    CALLS.append("reference")
    return (2 * x,)


def right(x: Tensor) -> tuple[Tensor]:
    CALLS.append("triton")
    return (x + x,)


def wrong(x: Tensor) -> tuple[Tensor]:
    return (2.1 * x,)


def throws(x: Tensor) -> tuple[Tensor]:
    raise RuntimeError("an illegal instruction was encountered\nand more")


def absent() -> dict:
    raise ImportError("Triton is not installed")


def late(trouble: Exception):
    """A kernel that passes its trial and fails at work."""

    def kernel(x: Tensor) -> tuple[Tensor]:
        if len(x) == 3:
            return plain(x)
        raise trouble

    return kernel


def op(kernel=None, load=None) -> Op:
    example = {"forward": (torch.arange(3.0),)}
    loaders = {"triton": load or (lambda: {"forward": kernel})}
    return Op("double", {"forward": plain}, loaders, lambda device, dtype, large: example)


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """Triton is asked for, in its interpreter; nothing was said before."""
    monkeypatch.setenv("ONESTEP_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(choice, "_said", set())
    CALLS.clear()


def run(op: Op) -> Tensor:
    x = torch.tensor([1.0, 2.0])
    return op.run("forward", x, x)[0]


def test_a_kernel_that_agrees_serves():
    assert run(op(right)).tolist() == [2.0, 4.0] and CALLS[-1] == "triton"


FAULTY = {
    "wrong": (op(wrong), "wrong by 0.05 in a trial"),
    "throws": (op(throws), "an illegal instruction was encountered"),
    "not a number": (op(lambda x: (x * float("nan"),)), "wrong by nan in a trial"),
    "another shape": (op(lambda x: (2 * x[None],)), r"gives [1, 3] of torch.float32, not [3] of torch.float32"),
    "another dtype": (op(lambda x: (2 * x.double(),)), "gives [3] of torch.float64, not [3] of torch.float32"),
    "absent": (op(load=absent), "Triton is not installed"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_kernel_is_never_used_and_told_of_once(name, caplog):
    faulty, reason = FAULTY[name]
    with caplog.at_level(logging.WARNING):
        assert run(faulty).tolist() == run(faulty).tolist() == [2.0, 4.0]
    assert faulty.state("triton", CPU, FLOAT) == reason
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"OneStep: ONESTEP_KERNELS asks for triton, but double has it not ({reason}): plain torch serves"]


def test_a_kernel_that_fails_at_work_is_replaced_and_told_of_once(caplog):
    faulty = op(late(RuntimeError("no space left in shared memory")))
    with caplog.at_level(logging.WARNING):
        assert run(faulty).tolist() == run(faulty).tolist() == [2.0, 4.0]
    lines = [record.getMessage() for record in caplog.records if "fails" in record.getMessage()]
    assert lines == ["OneStep: double by triton fails (no space left in shared memory): plain torch serves from now on"]
    assert faulty.state("triton", CPU, FLOAT) == "no space left in shared memory"


def test_shapes_that_a_kernel_does_not_serve_leave_it_in_use(caplog):
    narrow = op(late(NotServedError("odd")))
    assert run(narrow).tolist() == [2.0, 4.0]
    assert narrow.state("triton", CPU, FLOAT) == "works" and not caplog.records


def test_too_little_memory_is_no_fault_of_the_kernel():
    """Whoever called halves its batch and goes on."""
    full = op(late(torch.OutOfMemoryError("2 GiB")))
    with pytest.raises(torch.OutOfMemoryError):
        run(full)
    assert full.state("triton", CPU, FLOAT) == "works"


def test_the_first_call_may_come_under_inference_mode():
    with torch.inference_mode():
        assert run(op(right)).tolist() == [2.0, 4.0] and CALLS[-1] == "triton"


@pytest.mark.parametrize("wanted", ["reference", "auto", "AUTO"])
def test_on_a_cpu_plain_torch_serves_unless_another_is_forced(wanted, monkeypatch):
    monkeypatch.setenv("ONESTEP_KERNELS", wanted)
    assert op(throws).choice(CPU, FLOAT) == "reference"
    monkeypatch.delenv("ONESTEP_KERNELS")
    assert op(throws).choice(CPU, FLOAT) == "reference"


def test_what_cannot_be_had_is_said(monkeypatch):
    assert op(right).choice(CPU, torch.float64) == "reference"
    assert op(right).state("cuda", CPU, FLOAT) == "not written"
    monkeypatch.setenv("ONESTEP_KERNELS", "fastest")
    with pytest.raises(ValueError, match="'fastest': set it to one of auto, reference, triton, cuda"):
        op(right).choice(CPU, FLOAT)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert op(right).state("triton", CPU, FLOAT) == "needs a GPU"


def test_in_auto_the_fastest_that_works_is_chosen(monkeypatch):
    """Not one that is slower than plain torch on this card."""
    speeds = {"slow": 0.7, "fast": 1.2, "faster": 1.5}
    several = op(right)
    several.loaders = dict.fromkeys(speeds, lambda: {"forward": right}) | {"wrong": lambda: {"forward": wrong}}
    monkeypatch.setattr(Op, "speed", lambda self, name, device, dtype: speeds[name])
    monkeypatch.setattr(Op, "state", lambda self, name, *_: "works" if name in speeds else "wrong")
    card = torch.device("cuda:0")
    monkeypatch.setenv("ONESTEP_KERNELS", "auto")
    assert several.choice(card, FLOAT) == "faster"
    speeds.update(dict.fromkeys(speeds, 0.9))
    assert several.choice(card, FLOAT) == "reference"


def test_a_broken_triton_is_a_reason(monkeypatch):
    """Installed, and its import fails."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "onestep.kernels.triton_add_lora", None)
    choice.load_triton.cache_clear()
    broken = op(load=lambda: choice.load_triton("triton_add_lora"))
    assert run(broken).tolist() == [2.0, 4.0]
    assert "triton_add_lora" in broken.state("triton", CPU, FLOAT)
    monkeypatch.undo()
    choice.load_triton.cache_clear()
