"""The gate against the equation in NumPy's float64, finite differences, forward mode, and the bytes that it keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from onestep.kernels import gated, gated_reference
from onestep.kernels.gated import OP

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = [(5, 14), (2, 3, 74), (1, 1, 2, 2), (2, 4200)]
KINDS = ["geglu", "swiglu"]


def by_hand(projected: Tensor, kind: str) -> Tensor:
    """h g Phi(g), h g / (1 + exp(-g))."""
    h, g = projected.double().split(projected.shape[-1] // 2, -1)
    return h * g * ((1 + torch.erf(g / math.sqrt(2))) / 2 if kind == "geglu" else 1 / (1 + torch.exp(-g)))


def both(function, projected: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    leaf = projected.detach().clone().requires_grad_(True)
    out = function(leaf, kind)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, torch.autograd.grad((out * probe).sum(), leaf)[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradient_are_the_equations(shape, kind, dtype, implementation, device):
    assert OP.choice(device, dtype) == implementation
    projected = (2 * torch.randn(shape)).to(device, dtype)
    for mine, right in zip(both(gated, projected, kind), both(by_hand, projected.double(), kind), strict=True):
        assert mine.dtype == dtype and (mine - right).abs().max() <= TOLERANCE[dtype] * right.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_finite_differences_twice(kind):
    projected = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: gated(value, kind), projected)
    assert torch.autograd.gradgradcheck(lambda value: gated(value, kind), projected)


def test_forward_mode_has_the_tangent(implementation):
    value, move = torch.randn(3, 8), torch.randn(3, 8)
    _, tangent = torch.func.jvp(gated, (value,), (move,))
    h = 1e-6
    ends = [by_hand(value.double() + side * h * move.double(), "geglu") for side in (1, -1)]
    torch.testing.assert_close(tangent.double(), (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (8,)])
def test_nothing_and_a_vector(shape, implementation, device):
    projected = torch.randn(shape, device=device)
    for mine, right in zip(both(gated, projected, "geglu"), both(gated_reference, projected, "geglu"), strict=True):
        torch.testing.assert_close(mine, right)


def test_turned_inputs_and_gradients(implementation, device):
    projected = torch.randn(6, 5, device=device).t()[:, :6].requires_grad_(True)
    torch.testing.assert_close(gated(projected), gated_reference(projected))
    ours, right = (torch.autograd.grad(f(projected).sum(), projected)[0] for f in (gated, gated_reference))
    torch.testing.assert_close(ours, right)


def test_extremes_stay_finite(implementation, device):
    projected = torch.tensor([[1.0, 2.0, 3.0, 1e4, -1e4, 0.0]], device=device)
    for mine, right in zip(both(gated, projected, "swiglu"), both(gated_reference, projected, "swiglu"), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, right)


def test_two_thirds_of_what_is_kept_written_out():
    """The projection, 2 d a token; written out, gelu(g) too: 3 d."""
    kept = {}
    for function in (gated, gated_reference):
        storages: dict[int, int] = {}

        def note(value: Tensor, storages=storages) -> Tensor:
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        projected = torch.randn(7, 10, requires_grad=True) * 1
        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            out = function(projected, "geglu")
        assert out.requires_grad
        kept[function] = sum(storages.values())
    assert (kept[gated], kept[gated_reference]) == (7 * 10 * 4, 7 * 15 * 4)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="'relu' and the width 6: geglu or swiglu"):
        gated(torch.zeros(2, 6), "relu")
    with pytest.raises(ValueError, match="width 5"):
        gated(torch.zeros(2, 5))


def test_torch_knows_the_op(implementation):
    projected = torch.randn(3, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.onestep.gated.default, (projected, "geglu"))
    torch.library.opcheck(torch.ops.onestep.gated_backward.default, (torch.randn(3, 4), projected.detach(), "swiglu"))


def test_a_compiled_block_has_no_break():
    compiled = torch.compile(lambda value: gated(value) + 1, backend="aot_eager", fullgraph=True)
    projected = torch.randn(3, 8, requires_grad=True)
    torch.testing.assert_close(compiled(projected), gated_reference(projected) + 1)
