"""The low-rank product against its reference and against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onestep.kernels import low_rank_conv, low_rank_conv_reference, low_rank_linear, low_rank_linear_reference

LINEAR_SHAPES = [(3, 5), (2, 7, 5), (2, 3, 1, 4, 5), (0, 5)]
# name: input, kernel, stride, padding, dilation
CONVS = {
    "3x3": ((2, 5, 7, 6), (3, 3), 1, 1, 1),
    "stride": ((1, 5, 9, 7), (3, 3), (2, 2), (1, 1), (1, 1)),
    "1x1": ((3, 5, 4, 3), (1, 1), 1, 0, 1),
    "dilated": ((2, 5, 9, 8), (3, 1), 1, (2, 0), (2, 1)),
    "same": ((2, 5, 6, 7), (3, 3), 1, "same", 1),
}


def linear_case(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """base_out, x, a, b of a layer 5 -> 11 with rank 3."""
    base, x = torch.randn(*shape[:-1], 11, dtype=dtype), torch.randn(shape, dtype=dtype)
    return [base, x, torch.randn(3, 5, dtype=dtype), torch.randn(11, 3, dtype=dtype)]


def conv_case(name: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], tuple]:
    """base_out, x, a, b of a convolution 5 -> 11 with rank 3, and its geometry."""
    shape, kernel, *geometry = CONVS[name]
    x = torch.randn(shape, dtype=dtype)
    weight = torch.randn(11, 5, *kernel, dtype=dtype)
    base = torch.nn.functional.conv2d(x, weight, None, *geometry)
    return [base, x, torch.randn(3, 5, *kernel, dtype=dtype), torch.randn(11, 3, 1, 1, dtype=dtype)], tuple(geometry)


def gradients(function, inputs: list[Tensor], *geometry) -> list[Tensor]:
    """The output and the gradients of a fixed random projection of it."""
    leaves = [value.detach().clone().requires_grad_(True) for value in inputs]
    out = function(*leaves, *geometry)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *torch.autograd.grad((out * probe).sum(), leaves)]


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_linear_is_the_written_out_product(shape):
    case = linear_case(shape)
    assert_same(gradients(low_rank_linear, case), gradients(low_rank_linear_reference, case), 1e-12)


def test_linear_is_the_merged_weight():
    base, x, a, b = linear_case((4, 6, 5))
    weight = torch.randn(11, 5, dtype=torch.float64)
    merged = torch.nn.functional.linear(x, weight + b @ a)  # Eq. 3 of arXiv:2106.09685
    torch.testing.assert_close(low_rank_linear(x @ weight.T, x, a, b), merged, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_conv_is_the_merged_kernel(name, layout):
    (base, x, a, b), geometry = conv_case(name)
    base, x = base.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
    kernel = torch.einsum("or,rikl->oikl", b.flatten(1), a)
    expected = base + torch.nn.functional.conv2d(x, kernel, None, *geometry)
    out = low_rank_conv(base, x, a, b, *geometry)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert out.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_conv_is_the_written_out_product(name, layout):
    case, geometry = conv_case(name)
    case[:2] = [value.contiguous(memory_format=layout) for value in case[:2]]
    ours = gradients(low_rank_conv, case, *geometry)
    assert_same(ours, gradients(low_rank_conv_reference, case, *geometry), 1e-12)


def test_gradients_match_finite_differences():
    case = [value.requires_grad_(True) for value in linear_case((2, 3, 5))]
    assert torch.autograd.gradcheck(low_rank_linear, case, check_forward_ad=True)
    case, geometry = conv_case("dilated")
    leaves = [value.requires_grad_(True) for value in case]
    assert torch.autograd.gradcheck(lambda *values: low_rank_conv(*values, *geometry), leaves, check_forward_ad=True)


@pytest.mark.parametrize("shape", LINEAR_SHAPES[:3], ids=str)
def test_linear_forward_mode(shape):
    case = linear_case(shape)
    directions = [torch.randn_like(value) for value in case]
    h = 1e-6
    ahead = [value + h * move for value, move in zip(case, directions, strict=True)]
    behind = [value - h * move for value, move in zip(case, directions, strict=True)]
    _, tangent = torch.func.jvp(low_rank_linear, tuple(case), tuple(directions))
    expected = (low_rank_linear_reference(*ahead) - low_rank_linear_reference(*behind)) / (2 * h)
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CONVS)
def test_conv_forward_mode(name):
    case, geometry = conv_case(name)
    directions = tuple(torch.randn_like(value) for value in case)
    ours = torch.func.jvp(lambda *v: low_rank_conv(*v, *geometry), tuple(case), directions)
    theirs = torch.func.jvp(lambda *v: low_rank_conv_reference(*v, *geometry), tuple(case), directions)
    assert ours[1].abs().max() > 0.1
    assert_same(list(ours), list(theirs), 1e-12)


def test_rows_of_a_fused_layer_and_turned_inputs():
    """What roles hand in: a slice of a fused output, a split of a batch, a transposed input."""
    _, x, a, b = linear_case((6, 4, 5))
    fused = torch.randn(6, 4, 40, dtype=torch.float64)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    piece = fused.narrow(-1, 13, 11).split(2)[1]
    out = low_rank_linear(piece, turned[2:4], a, b)
    torch.testing.assert_close(out, low_rank_linear_reference(piece, x[2:4], a, b), rtol=1e-12, atol=1e-12)
    (base, x, a, b), geometry = conv_case("3x3")
    wide = torch.cat([base, base, base], 1)
    out = low_rank_conv(wide.narrow(1, 11, 11), x, a, b, *geometry)
    torch.testing.assert_close(out, low_rank_conv_reference(base, x, a, b, *geometry), rtol=1e-12, atol=1e-12)


def test_nothing_is_written_in_place():
    case = linear_case((3, 5))
    before = [value.clone() for value in case]
    low_rank_linear(*case)
    convolution, geometry = conv_case("3x3")
    kept = [value.clone() for value in convolution]
    low_rank_conv(*convolution, *geometry)
    assert all(torch.equal(now, then) for now, then in zip(case + convolution, before + kept, strict=True))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("in_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float32_masters_beside_a_half_network(in_dtype, out_dtype):
    """Factors and their gradients are float32; the result has the layer's dtype and half precision's accuracy."""
    base, x, a, b = linear_case((2, 7, 5), torch.float32)
    exact = low_rank_linear_reference(base.double(), x.double(), a.double(), b.double())
    a.requires_grad_(True), b.requires_grad_(True)
    out = low_rank_linear(base.to(out_dtype), x.to(in_dtype), a, b)
    out.float().sum().backward()
    assert out.dtype == out_dtype and a.grad.dtype == b.grad.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=0.03, atol=0.15)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_half_convolution_with_float32_masters(layout):
    (base, x, a, b), geometry = conv_case("3x3", torch.float32)
    exact = low_rank_conv_reference(base.double(), x.double(), a.double(), b.double(), *geometry)
    for out_dtype in (torch.bfloat16, torch.float32):
        half = base.to(out_dtype).contiguous(memory_format=layout)
        out = low_rank_conv(half, x.bfloat16(), a, b, *geometry)
        assert out.dtype == out_dtype
        torch.testing.assert_close(out.double(), exact, rtol=0.05, atol=0.5)
