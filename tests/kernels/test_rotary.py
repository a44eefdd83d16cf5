"""Norm and rotary embedding against the equations in NumPy's float64, finite differences and forward mode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from onestep.kernels import normed_rotary, normed_rotary_reference
from onestep.kernels.rotary import OP

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = [(2, 5, 3, 6), (1, 19, 2, 40), (1, 1, 1, 2), (1, 3, 1, 128)]
"""Batch, tokens, heads, channels."""
EPS = 1e-3


def case(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, weight, cos and sin."""
    _, length, _, width = shape
    angle = torch.randn(length, width // 2).repeat_interleave(2, 1).to(device)
    wide = torch.promote_types(dtype, torch.float32)
    x, weight = torch.randn(shape), 1 + 0.3 * torch.randn(width)
    return [x.to(device, dtype), weight.to(device, dtype), angle.to(wide).cos(), angle.to(wide).sin()]


def by_hand(x, weight, cos, sin) -> np.ndarray:
    """arXiv:1910.07467, Eq. 4; arXiv:2104.09864, Eq. 34, as a rotation of each pair by its angle."""
    x, weight, cos, sin = (value.detach().double().cpu().numpy() for value in (x, weight, cos, sin))
    n = weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    pairs = n[..., 0::2] + 1j * n[..., 1::2]
    turned = pairs * (cos + 1j * sin)[None, :, None, 0::2]
    return np.stack((turned.real, turned.imag), -1).reshape(x.shape)


def gradient_of(function, values: list[Tensor]) -> tuple[Tensor, Tensor]:
    x = values[0].detach().clone().requires_grad_(True)
    out = function(x, *values[1:], EPS)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, torch.autograd.grad((out * probe).sum(), x)[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_is_the_equations_and_the_gradient_its_slope(shape, dtype, implementation, device):
    """The gradient along a direction, by differences of the equations in float64."""
    assert OP.choice(device, dtype) == implementation
    values = case(shape, dtype, device)
    out, gradient = gradient_of(normed_rotary, values)
    right = by_hand(*values)
    assert (
        out.dtype == dtype
        and np.abs(out.double().detach().cpu().numpy() - right).max() <= TOLERANCE[dtype] * np.abs(right).max()
    )
    _, exact = gradient_of(normed_rotary_reference, [value.double() for value in values])
    assert (gradient - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


def test_gradients_match_finite_differences_twice():
    values = case((2, 3, 2, 4), torch.float64, torch.device("cpu"))
    x, weight = (value.requires_grad_(True) for value in values[:2])
    assert torch.autograd.gradcheck(lambda x: normed_rotary(x, values[1].detach(), *values[2:], EPS), x)
    assert torch.autograd.gradgradcheck(lambda x: normed_rotary(x, values[1].detach(), *values[2:], EPS), x)
    assert torch.autograd.gradcheck(lambda x, w: normed_rotary(x, w, *values[2:], EPS), (x, weight))


def test_forward_mode_has_the_tangent(implementation):
    values = case((1, 3, 2, 6), torch.float32, torch.device("cpu"))
    move, h = torch.randn(values[0].shape), 1e-6
    _, tangent = torch.func.jvp(lambda x: normed_rotary(x, *values[1:], EPS), (values[0],), (move,))
    ends = [by_hand(values[0].double() + side * h * move.double(), *values[1:]) for side in (1, -1)]
    torch.testing.assert_close(tangent.double(), torch.from_numpy(ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5, 3, 6), (2, 0, 3, 6), (2, 5, 0, 6)])
def test_nothing_to_serve(shape, implementation, device):
    out, gradient = gradient_of(normed_rotary, case(shape, torch.float32, device))
    assert out.shape == gradient.shape == torch.Size(shape)


def test_turned_inputs_gradients_and_wide_heads(implementation, device):
    """As a projection and a transpose leave them; a gradient that is expanded; channels beyond the kernel's."""
    values = case((2, 4, 3, 6), torch.float32, device)
    x = values[0].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(True)
    weight, cos, sin = values[1], values[2].t().contiguous().t(), values[3]
    torch.testing.assert_close(
        normed_rotary(x, weight, cos, sin, EPS), normed_rotary_reference(x, weight, cos, sin, EPS)
    )
    ours, right = (
        torch.autograd.grad(f(x, weight, cos, sin, EPS).sum(), x)[0] for f in (normed_rotary, normed_rotary_reference)
    )
    torch.testing.assert_close(ours, right)
    wide = case((1, 2, 1, 1024), torch.float32, device)
    torch.testing.assert_close(normed_rotary(*wide, EPS), normed_rotary_reference(*wide, EPS))


def test_extremes_stay_finite(implementation, device):
    values = case((1, 2, 1, 6), torch.float32, device)
    values[0] = torch.tensor([[[[0.0] * 6]], [[[1e15, -1e15, 0, 0, 0, 1e-20]]]], device=device).view(1, 2, 1, 6)
    for mine, right in zip(
        gradient_of(normed_rotary, values), gradient_of(normed_rotary_reference, values), strict=True
    ):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, right)


def test_it_is_what_diffusers_computes():
    """Its RMSNorm and its rotary embedding, as its Flux calls them."""
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.normalization import RMSNorm

    x, weight, cos, sin = case((2, 5, 3, 8), torch.float32, torch.device("cpu"))
    norm = RMSNorm(8, EPS)
    norm.weight.data.copy_(weight)
    right = apply_rotary_emb(norm(x), (cos, sin), sequence_dim=1)
    torch.testing.assert_close(normed_rotary(x, weight, cos, sin, EPS), right)


def test_x_alone_is_kept():
    values, sizes = case((1, 7, 3, 8), torch.bfloat16, torch.device("cpu")), {}
    x = values[0].requires_grad_(True) * 1
    for function in (normed_rotary, normed_rotary_reference):
        storages: dict[int, int] = {}

        def note(value: Tensor, storages=storages) -> Tensor:
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            out = function(x, *values[1:], EPS)
        given = {value.untyped_storage().data_ptr() for value in values[1:]}
        sizes[function] = sum(size for at, size in storages.items() if at not in given)
        assert out.requires_grad
    assert sizes[normed_rotary] == 2 * x.numel() < sizes[normed_rotary_reference] / 4


def test_torch_knows_the_op(implementation):
    values = case((1, 3, 2, 6), torch.float32, torch.device("cpu"))
    x = values[0].clone().requires_grad_(True)
    torch.library.opcheck(torch.ops.onestep.normed_rotary.default, (x, *values[1:], EPS))
    torch.library.opcheck(torch.ops.onestep.normed_rotary_backward.default, (values[0], *values, EPS))


def test_a_compiled_block_has_no_break():
    values = case((1, 3, 2, 6), torch.float32, torch.device("cpu"))
    compiled = torch.compile(lambda x: normed_rotary(x, *values[1:], EPS) + 1, backend="aot_eager", fullgraph=True)
    x = values[0].requires_grad_(True)
    torch.testing.assert_close(compiled(x), normed_rotary_reference(*values, EPS) + 1)
