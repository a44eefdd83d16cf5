"""A convolution's added products against merged kernels in float64, finite differences and forward mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onestep.kernels import LoRA, Place, add_lora_conv, add_lora_conv_reference

# input, kernel, stride, padding, dilation
CONVS = {
    "3x3": ((4, 5, 7, 6), (3, 3), 1, 1, 1),
    "stride": ((4, 5, 9, 7), (3, 3), (2, 2), (1, 1), (1, 1)),
    "1x1": ((4, 5, 4, 3), (1, 1), 1, 0, 1),
    "dilated": ((4, 5, 9, 8), (3, 1), 1, (2, 0), (2, 1)),
    "same": ((4, 5, 6, 7), (3, 3), 1, "same", 1),
}
# the teacher's row first; two targets of a fused layer; and one adapter everywhere
PLACES = {
    "rows": [Place(slice(1, 2)), Place(slice(2, 4), slice(0, 4)), Place(slice(2, 4), slice(6, 11), 0.5)],
    "all": [Place(scale=2.0)],
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def case(name: str, places: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], tuple]:
    """x, the layer's weight and factors of ranks 3, 4, 5; the layer's geometry."""
    shape, kernel, *geometry = CONVS[name]
    values = [torch.randn(shape, dtype=dtype), torch.randn(11, 5, *kernel, dtype=dtype)]
    for rank, place in enumerate(PLACES[places], 3):
        rows = len(range(*place.features.indices(11)))
        values += [torch.randn(rank, 5, *kernel, dtype=dtype), torch.randn(rows, rank, 1, 1, dtype=dtype)]
    return values, tuple(geometry)


def merged(x: Tensor, weight: Tensor, *rest) -> Tensor:
    """Each row convolved with W + s B A of its own."""
    *factors, places, geometry = rest
    weights = weight.expand(len(x), *weight.shape).clone()
    for a, b, (rows, features, scale) in zip(factors[::2], factors[1::2], places, strict=True):
        weights[rows, features] += scale * torch.einsum("or,rikl->oikl", b.flatten(1), a)
    convolved = [
        torch.nn.functional.conv2d(row[None], own, None, *geometry) for row, own in zip(x, weights, strict=True)
    ]
    return torch.cat(convolved)


def ours(x: Tensor, weight: Tensor, *rest) -> Tensor:
    *factors, places, geometry = rest
    loras = [LoRA(a, b, place) for a, b, place in zip(factors[::2], factors[1::2], places, strict=True)]
    return add_lora_conv(torch.nn.functional.conv2d(x, weight, None, *geometry), x, loras, *geometry)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", CONVS)
def test_output_and_gradients_are_those_of_merged_kernels(name, places, layout):
    values, geometry = case(name, places)
    values[0] = values[0].contiguous(memory_format=layout)
    leaves = [value.requires_grad_(True) for value in values]
    found, right = (function(*leaves, PLACES[places], geometry) for function in (ours, merged))
    probe = torch.randn_like(right)
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)
    assert found.is_contiguous(memory_format=layout)
    pairs = (torch.autograd.grad((value * probe).sum(), leaves) for value in (found, right))
    for mine, other in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("places", PLACES)
def test_forward_mode_and_second_derivatives(places):
    values, geometry = case("3x3", places)
    moves = tuple(torch.randn_like(value) for value in values)
    tangents = [
        torch.func.jvp(lambda *v, f=function: f(*v, PLACES[places], geometry), tuple(values), moves)[1]
        for function in (ours, merged)
    ]
    torch.testing.assert_close(*tangents, rtol=1e-11, atol=1e-11)
    leaves = [value[..., :2, :2].clone() if index == 0 else value for index, value in enumerate(values)]
    leaves = [leaf.detach().requires_grad_(index != 1) for index, leaf in enumerate(leaves)]
    found, right = (function(*leaves, PLACES[places], geometry) for function in (ours, merged))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    second = []
    for value in (found, right):
        first = torch.autograd.grad(value.square().sum(), wanted, create_graph=True)
        second.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), wanted))
    for mine, other in zip(*second, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_nobody_serves_keeps_every_bit(layout):
    (x, _, *factors), geometry = case("3x3", "rows", torch.float32)
    out = torch.randn(4, 11, 7, 6).contiguous(memory_format=layout)
    before = out.clone()
    loras = [LoRA(a, b, place) for a, b, place in zip(factors[::2], factors[1::2], PLACES["rows"], strict=True)]
    found = add_lora_conv(out, x, loras, *geometry)
    assert found.data_ptr() == out.data_ptr()
    assert torch.equal(found[0], before[0]) and torch.equal(found[2:, 4:6], before[2:, 4:6])
    torch.testing.assert_close(found, add_lora_conv_reference(before, x, loras, *geometry))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_masters_beside_a_half_network(dtype):
    values, geometry = case("3x3", "rows", torch.float32)
    exact = merged(*(value.double() for value in values), PLACES["rows"], geometry)
    x, weight, *factors = values
    factors = [factor.requires_grad_(True) for factor in factors]
    out = ours(x.to(dtype), weight.to(dtype), *factors, PLACES["rows"], geometry)
    out.float().sum().backward()
    assert out.dtype == dtype and all(factor.grad.dtype == torch.float32 for factor in factors)
    assert (out.double() - exact).abs().max() <= 0.02 * exact.abs().max()
