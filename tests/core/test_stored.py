"""Weights in float8: the layer of the widened weight, its gradient to the input, and nothing wide kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from onestep.core.stored import (
    FLOAT8,
    StoredConv2d,
    StoredLinear,
    holds_float8,
    in_float8,
    serve,
    store,
    weight_of,
    widened,
)

LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "without a bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
    "point": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 3)),
}
EPS = {torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3}
"""Half of the distance of neighbours, as a share."""


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", FLOAT8, ids=str)
@pytest.mark.parametrize("scaled", [True, False])
def test_it_is_the_layer_of_its_widened_weight(name: str, kind: torch.dtype, scaled: bool) -> None:
    """Forward and gradient, against the plain layer with that weight; and a weight as near as float8 is."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    plain, layer = make().requires_grad_(False), make()
    before = layer.weight.detach().clone()
    store(layer, kind, scaled)
    weight = widened(layer.weight, layer.weight_scale, torch.float32)
    assert layer.weight.dtype is kind and not layer.weight.requires_grad
    least = float(before.abs().max()) * (2.0**-9 if scaled else 0) + (0 if scaled else 2.0**-9)
    assert bool(((weight - before).abs() <= EPS[kind] * before.abs() + least).all())
    plain.weight.copy_(weight)
    if plain.bias is not None:
        plain.bias.copy_(layer.bias.detach())
    x = torch.randn(shape)
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = layer(found), plain(wanted)
    torch.testing.assert_close(y, z)
    cotangent = torch.randn(y.shape)
    y.backward(cotangent)
    z.backward(cotangent)
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_its_directional_derivative_is_its_gradients(name: str) -> None:
    """<dy, J dx> = <J^T dy, dx>: forward mode and backward are one derivative."""
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    layer = make()
    store(layer)
    x, dx = torch.randn(shape), torch.randn(shape)
    y, tangent = torch.func.jvp(layer, (x,), (dx,))
    leaf = x.clone().requires_grad_()
    dy = torch.randn(y.shape)
    layer(leaf).backward(dy)
    assert leaf.grad is not None
    assert float((dy * tangent).sum()) == pytest.approx(float((leaf.grad * dx).sum()), rel=1e-4, abs=1e-4)


def test_a_scale_keeps_small_weights() -> None:
    """Weights of 1e-4 vanish in plain float8, whose least number is 2e-3."""
    layers = [nn.Linear(64, 8), nn.Linear(64, 8)]
    for layer, scaled in zip(layers, (True, False), strict=True):
        torch.nn.init.normal_(layer.weight, std=1e-4)
        store(layer, scaled=scaled)
    kept, lost = (widened(layer.weight, layer.weight_scale, torch.float32) for layer in layers)  # type: ignore[arg-type]
    assert float((kept == 0).float().mean()) < 0.05 < 0.9 < float((lost == 0).float().mean())


def test_no_wide_weight_waits_for_backward() -> None:
    layer = nn.Linear(32, 32)
    store(layer)
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, t.numel())) or t, lambda t: t):
        layer(torch.randn(1, 32, requires_grad=True))
    assert (torch.float8_e4m3fn, 1024) in kept and (torch.float32, 1024) not in kept


def test_a_network_that_was_loaded_in_float8_computes() -> None:
    """Layers of its blocks keep their weights; the rest, which is small, is widened."""
    block = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 6, 1))
    network = nn.Sequential(nn.Linear(4, 6), block).requires_grad_(False)
    network.to(torch.float8_e4m3fn)
    assert in_float8(network)
    serve(network, [block], torch.bfloat16)
    assert type(block[0]) is StoredLinear and type(block[3]) is StoredConv2d and type(network[0]) is nn.Linear
    assert block[0].weight.dtype is block[3].weight.dtype is torch.float8_e4m3fn
    assert {network[0].weight.dtype, block[0].bias.dtype, block[1].weight.dtype} == {torch.bfloat16}
    x = torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True)
    network(x).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_a_device_that_is_not_there_holds_no_float8() -> None:
    assert holds_float8(torch.device("cpu")) and not holds_float8(torch.device("mps"))


@pytest.mark.parametrize("kind", [*FLOAT8, torch.float16, torch.float32])
def test_the_numbers_that_a_layer_stands_for(kind: torch.dtype) -> None:
    layer = nn.Linear(6, 5)
    before = layer.weight.detach().clone()
    if kind in FLOAT8:
        store(layer, kind)
    else:
        layer.to(kind)
    found = weight_of(layer)
    assert found.dtype == torch.float32 and float((found - before).abs().max()) < 0.07
    eye = torch.eye(6, dtype=torch.float32 if kind in FLOAT8 else kind)
    zero = 0 if layer.bias is None else layer.bias.to(eye.dtype)
    torch.testing.assert_close((layer.to("cpu")(eye) - zero).float().t(), found, rtol=1e-3, atol=1e-3)
