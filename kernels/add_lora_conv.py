"""The low-rank products of a convolution's adapters, added to its output in place.

A convolves as the layer does, B mixes A's channels, a matrix product at each place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .add_lora import LoRA, Place, may_be_written

Size = int | Sequence[int]


def add_lora_conv(
    out: Tensor,
    x: Tensor,
    loras: Sequence[LoRA],
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
) -> Tensor:
    """out[rows, features] + s B (A * x[rows]): A convolves as the layer does, B mixes its channels.

    out: [N, out, H', W'], a convolution's fresh output, any strides, written over as in `add_lora`. x: [N, in, H, W].
    stride, padding, dilation: the layer's own. Returns a tensor of out's shape, dtype and layout.
    """
    geometry = stride, padding, dilation
    if not may_be_written(out):
        return add_lora_conv_reference(out, x, loras, *geometry)
    products = [_convolved(x, lora, geometry).to(out.dtype) for lora in loras]
    if len(products) == 1 and products[0].shape == out.shape:
        return products[0].add_(out)  # which is nobody's yet, and which no derivative needs
    if torch.is_grad_enabled() and any(value.requires_grad for value in (out, *products)):
        return _AddProducts.apply(out, [lora.place for lora in loras], *products)
    for lora, product in zip(loras, products, strict=True):
        out[lora.place.rows, lora.place.features].add_(product)
    return out


def add_lora_conv_reference(
    out: Tensor,
    x: Tensor,
    loras: Sequence[LoRA],
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
) -> Tensor:
    """What `add_lora_conv` computes, written out in a new tensor; every derivative of it works."""
    out = out.clone()
    for lora in loras:
        a, b, (rows, _, scale) = lora
        hidden = F.conv2d(x[rows], a.to(x), None, stride, padding, dilation)  # type: ignore[arg-type]
        product = F.conv2d(hidden, (scale * b).to(x))
        out[lora.place.rows, lora.place.features] += product.to(out.dtype)
    return out


def _convolved(x: Tensor, lora: LoRA, geometry: tuple[Any, Any, Any]) -> Tensor:
    a, b, (rows, _, scale) = lora
    hidden = F.conv2d(x[rows], a.to(x), None, *geometry)
    return mixed(hidden, (b if scale == 1 else scale * b).to(x))


def mixed(hidden: Tensor, b: Tensor) -> Tensor:
    """B h [N, out, H, W] of h [N, r, H, W], in h's layout. b: [out, r, 1, 1]. A matrix product at each place, which a
    library's convolution takes much of the host's time to set up."""
    if hidden.is_contiguous():
        up = b.flatten(1).expand(len(hidden), -1, -1)
        return up.bmm(hidden.flatten(2)).view(len(hidden), -1, *hidden.shape[2:])
    return F.linear(hidden.permute(0, 2, 3, 1), b.flatten(1)).permute(0, 3, 1, 2)


class _AddProducts(torch.autograd.Function):
    """out[rows, features] += product, for each."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, places: list[Place], *products: Tensor) -> Tensor:
        ctx.places, written = places, out.detach()
        for place, product in zip(places, products, strict=True):
            written[place.rows, place.features].add_(product)
        return written

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None, *(gradients[0][place.rows, place.features] for place in ctx.places)
