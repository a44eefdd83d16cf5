"""Every op without a GPU, on an old one, without Triton, with a broken one, and with a kernel that throws: plain
torch's numbers through the public function, forward and backward, and one sentence in the log."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from onestep.kernels import (
    LoRA,
    Place,
    Steer,
    add_lora,
    add_lora_reference,
    choice,
    gated,
    gated_reference,
    normed_rotary,
    normed_rotary_reference,
    steered_attention,
    steered_attention_reference,
)
from onestep.kernels.choice import Op
from onestep.kernels.ops import OPS, states

CPU = torch.device("cpu")
PLACES = [Place(slice(0, 2)), Place(slice(2, 3), slice(1, 7), 0.5)]
STEER = Steer(3.0, True, 1.3, 0.5)
Call = Callable[..., Tensor]


def loras(a, b, a2, b2) -> list[LoRA]:
    return [LoRA(a, b, PLACES[0]), LoRA(a2, b2, PLACES[1])]


PUBLIC: dict[str, tuple[Call, Call]] = {
    "add_lora": (
        lambda out, x, *factors: add_lora(out * 1, x, loras(*factors)),
        lambda out, x, *factors: add_lora_reference(out, x, loras(*factors)),
    ),
    "gated": (gated, gated_reference),
    "normed_rotary": (
        lambda x, *rest: normed_rotary(x, *(value.detach() for value in rest), 1e-5),
        lambda x, *rest: normed_rotary_reference(x, *(value.detach() for value in rest), 1e-5),
    ),
    "steered_attention": (
        lambda *tensors: steered_attention(*tensors, STEER),
        lambda *tensors: steered_attention_reference(*tensors, STEER),
    ),
}
"""By op: the public function and what it computes, written out."""
SHAPES = {
    "add_lora": [(3, 5, 8), (3, 5, 6), (2, 6), (8, 2), (4, 6), (6, 4)],
    "gated": [(3, 5, 12)],
    "normed_rotary": [(3, 5, 2, 6), (6,), (5, 6), (5, 6)],
    "steered_attention": [(2, 2, 9, 4), (2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 7, 4), (2, 2, 7, 4)],
}
NAMES = [op.name for op in OPS]


def test_every_op_is_tried_here():
    assert NAMES == list(PUBLIC) == list(SHAPES) == list(states(CPU))


def drawn(name: str, dtype: torch.dtype = torch.float32, turned: bool = False, batch: int | None = None):
    source = torch.Generator().manual_seed(0)
    found = []
    for number, shape in enumerate(SHAPES[name]):
        if batch is not None and len(shape) > 2:
            shape = (batch, *shape[1:])
        value = torch.randn(shape, generator=source).to(dtype)
        if turned and value.ndim > 1:
            value = value.transpose(0, -1).contiguous().transpose(0, -1)
        found.append(value.requires_grad_(number == 0 or len(shape) > 1))
    return found


def passed(call: Call, values: list[Tensor]) -> list[Tensor]:
    leaves = [value.detach().requires_grad_(value.requires_grad) for value in values]
    out = call(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [out, *torch.autograd.grad(out.float().square().sum(), wanted, allow_unused=True, materialize_grads=True)]


def assert_served(name: str, values: list[Tensor], tolerance: float = 1e-5) -> None:
    """With a graph and without: the first is another way through the op."""
    ours, right = PUBLIC[name]
    for mine, other in zip(passed(ours, values), passed(right, values), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        plain = [value.detach() for value in values]
        torch.testing.assert_close(ours(*plain), right(*plain), rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """Triton is asked for; nothing was tried or said before, nor is what is found here remembered."""
    monkeypatch.setenv("ONESTEP_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(choice, "_said", set())
    for op in OPS:
        monkeypatch.setattr(op, "_states", {})
        monkeypatch.setattr(op, "loaders", dict(op.loaders))
    choice.load_triton.cache_clear()
    yield
    choice.load_triton.cache_clear()


def of(name: str) -> Op:
    return next(op for op in OPS if op.name == name)


def told(caplog, name: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if f"{name} " in record.getMessage()]


@pytest.mark.parametrize("name", NAMES)
def test_without_a_gpu(name, monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert_served(name, drawn(name))
    assert of(name).state("triton", CPU, torch.float32) == "needs a GPU"
    (line,) = told(caplog, name)
    assert line == f"OneStep: ONESTEP_KERNELS asks for triton, but {name} has it not (needs a GPU): plain torch serves"
    monkeypatch.setenv("ONESTEP_KERNELS", "auto")
    caplog.clear()
    assert_served(name, drawn(name))
    assert not caplog.records and states(CPU)[name].startswith("plain torch serves (triton: needs a GPU")


@pytest.mark.parametrize("name", NAMES)
def test_without_triton(name, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    assert_served(name, drawn(name))
    assert of(name).state("triton", CPU, torch.float32) == "Triton is not installed"
    assert len(told(caplog, name)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_with_a_broken_triton(name, monkeypatch, caplog):
    """It is installed, and its import fails."""
    module = {"normed_rotary": "rotary", "steered_attention": "steered"}.get(name, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: object())
    monkeypatch.setitem(sys.modules, f"onestep.kernels.triton_{module}", None)
    assert_served(name, drawn(name))
    assert f"triton_{module}" in of(name).state("triton", CPU, torch.float32)
    assert len(told(caplog, name)) == 1


def throwing(op: Op, monkeypatch, trouble: Exception, armed: list[bool]) -> None:
    """A kernel that is right until it is armed."""

    def part(name: str):
        def kernel(*given):
            if armed[0]:
                raise trouble
            return op.reference[name](*given)

        return kernel

    parts = {name: part(name) for name in op.reference}
    monkeypatch.setitem(op.loaders, "triton", lambda: parts)


@pytest.mark.parametrize("name", NAMES)
def test_on_an_old_card(name, monkeypatch, caplog):
    """Its compiler refuses in the trial."""
    refusal = RuntimeError("Feature 'cvt.bf16' requires .target sm_80 or higher\nptxas fatal")
    throwing(of(name), monkeypatch, refusal, [True])
    assert_served(name, drawn(name))
    reason = "Feature 'cvt.bf16' requires .target sm_80 or higher"
    assert of(name).state("triton", CPU, torch.float32) == reason
    (line,) = told(caplog, name)
    assert reason in line and "ptxas" not in line


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_that_throws_at_work(name, monkeypatch, caplog):
    """After a trial that it passed; in the middle of a step, forward or backward."""
    armed = [False]
    op = of(name)
    throwing(op, monkeypatch, RuntimeError("an illegal memory access was encountered"), armed)
    assert op.choice(CPU, torch.float32) == "triton"
    assert_served(name, drawn(name))
    armed[0] = True
    with caplog.at_level(logging.WARNING):
        assert_served(name, drawn(name))
    (line,) = told(caplog, name)
    assert line == (
        f"OneStep: {name} by triton fails (an illegal memory access was encountered): plain torch serves from now on"
    )
    assert op.choice(CPU, torch.float32) == "reference"


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_that_is_wrong_is_not_used(name, monkeypatch):
    op = of(name)
    wrong = {
        part: lambda *given, part=part: tuple(1.1 * r for r in op.reference[part](*given)) for part in op.reference
    }
    monkeypatch.setitem(op.loaders, "triton", lambda: wrong)
    assert_served(name, drawn(name))
    assert op.state("triton", CPU, torch.float32).startswith("wrong by ")


@pytest.mark.parametrize("kind", ["turned", "empty", "float64", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_whatever_comes_in(name, kind, implementation):
    """Strides as a transpose leaves them, no samples at all, a dtype that no kernel serves, half precision."""
    dtype = {"float64": torch.float64, "float16": torch.float16}.get(kind, torch.float32)
    values = drawn(name, dtype, kind == "turned", 0 if kind == "empty" else None)
    assert_served(name, values, 2e-2 if kind == "float16" else 2e-5)


def outcome(call: Call, values: list[Tensor]) -> Tensor | str:
    """What it gives, or the sentence that it refuses with."""
    try:
        return call(*values)
    except (RuntimeError, TypeError, NotImplementedError) as refusal:
        return str(refusal).splitlines()[0]


@pytest.mark.parametrize("kind", ["the first wider", "whole numbers"])
@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_are_served_or_refused_as_plain_torch_does(name, kind, implementation):
    values = [value.detach() for value in drawn(name)]
    values = [value.long() for value in values] if kind == "whole numbers" else [values[0].double(), *values[1:]]
    ours, right = (outcome(call, values) for call in PUBLIC[name])
    if isinstance(right, str):
        assert ours == right and 10 < len(right) < 300
    else:
        assert isinstance(ours, Tensor)
        torch.testing.assert_close(ours, right)
