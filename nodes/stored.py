"""ComfyUI's layers that cast, dequantise or fetch their weight at each use: nothing of that waits for backward.

    y = the layer's own forward(x),   dx = dy W,   W: the weight as ComfyUI makes it for a product, made again

Without this autograd keeps each made weight until backward: a whole base in the computing dtype beside the stored one.
A layer that also rounds its input (fp8 and int8 products) has the gradient of the product of what was not rounded.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from ..core.stored import is_plain
from ..core.targets import is_adaptable, is_conv
from ..kernels.attention import in_forward_ad


def keep_stored(network: nn.Module) -> None:
    """Make the linear and convolution layers of a private ``network`` keep what is stored, and no more."""
    for layer in network.modules():
        if isinstance(layer, comfy.ops.CastWeightBiasOp) and is_adaptable(layer):
            layer.__class__ = _keeping(type(layer))


@cache
def _keeping(kind: type) -> type:
    """The layer's class, of the same name, with its own forward within `_Kept`."""

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        _settle(self, input)
        if _as_it_is(self, input) or not isinstance(input, Tensor) or not _differentiated(input):
            return kind.forward(self, input, *args, **kwargs)  # type: ignore[attr-defined]
        return _Kept.apply(input, self, kind)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _settle(layer: Any, x: Tensor) -> None:
    """A weight that is cast at each use to another dtype of its size is stored as that, once: the same rounding."""
    weight = layer.weight
    if is_plain(weight) and weight.dtype != x.dtype and weight.dtype.itemsize == x.dtype.itemsize:
        for value in (weight, layer.bias):
            if value is not None and is_plain(value):
                value.data = value.data.to(x.dtype)


def _as_it_is(layer: Any, x: Tensor) -> bool:
    """Whether the product reads the stored weight itself, so that autograd keeps no other."""
    weight = layer.weight
    patched = len(layer.weight_function) > 0
    return is_plain(weight) and weight.dtype == x.dtype and weight.device == x.device and not patched


def _differentiated(x: Tensor) -> bool:
    return (torch.is_grad_enabled() and x.requires_grad) or in_forward_ad()


def made_weight(layer: Any, like: Tensor) -> Tensor:
    """W of a layer in the dtype and on the device of ``like``, as ComfyUI makes it."""
    weight, _ = comfy.ops.cast_bias_weight(layer, dtype=like.dtype, device=like.device, bias_dtype=like.dtype)
    weight = weight if is_plain(weight) else weight.dequantize()
    # ModelOpt smooths the inputs of some layers
    smooth = getattr(layer, "pre_quant_scale", None)
    return weight.to(like) if smooth is None else weight.to(like) * smooth.to(like)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, layer: Any, kind: Any) -> Tensor:
        x = x.detach()
        if isinstance(layer, comfy.ops.fp8_ops.Linear):
            x = x.clone()  # it limits its input in place
        return kind.forward(layer, x)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.layer, _ = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        dy, layer = gradients[0], ctx.layer
        weight = made_weight(layer, dy)
        if is_conv(layer):
            geometry = layer.stride, layer.padding, layer.dilation, layer.groups
            return conv2d_input(ctx.shape, weight, dy, *geometry), None, None
        # dx = dy W
        return dy @ weight, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        dx, layer = tangents[0], ctx.layer
        weight = made_weight(layer, dx)
        if is_conv(layer):
            return F.conv2d(dx, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.linear(dx, weight)
