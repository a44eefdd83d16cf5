r"""A frozen base's weights in float8: half the room of bfloat16's, cast for the product, and again for its gradient.

    y = x W^T + bias,  W = s Q,   dx = dy W        Q: float8, e4m3fn or e5m2; s: a scale, 1 or one for each output row

A cast weight that autograd kept until backward would take more room than was saved: what is kept is Q.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from .targets import is_adaptable

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def is_plain(weight: Any) -> bool:
    """Whether ``weight`` is a tensor of numbers to compute with: not quantised, and of no class of its own."""
    return type(weight) in (Tensor, nn.Parameter) and type(weight.data) is Tensor and weight.dtype in PLAIN


def stored_as(network: nn.Module) -> str:
    """How a network's quantised weights are stored, in a word; "" where all are plain."""
    weights: list[Any] = [layer.weight for layer in network.modules() if is_adaptable(layer)]
    return ", ".join(sorted({_kind(weight) for weight in weights if not is_plain(weight)}))


def _kind(weight: Any) -> str:
    """By bitsandbytes' own word, by that of a ComfyUI layout (TensorCoreNVFP4Layout), or by its dtype."""
    layout = re.sub("^(TensorCore|TensorWise|Asym)|Layout$", "", getattr(weight, "_layout_cls", "")).lower()
    return getattr(weight, "quant_type", "") or layout or str(weight.dtype).removeprefix("torch.")


def in_float8(network: nn.Module) -> bool:
    """Whether any of its weights are."""
    return any(value.dtype in FLOAT8 for value in network.parameters())


def holds_float8(device: torch.device) -> bool:
    """Whether a device holds float8 and widens it; Apple's do not."""
    try:
        torch.zeros(1, dtype=FLOAT8[0], device=device).to(torch.float16)
    except (RuntimeError, TypeError, NotImplementedError, AssertionError):
        return False
    return True


@torch.no_grad()
def serve(network: nn.Module, blocks: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Make a ``network`` that was loaded in float8 compute in ``dtype``: linear and convolution layers of its
    ``blocks`` keep their weights, all else is small and becomes ``dtype``. Layers of a kind of their own stay."""
    kept: set[Any] = {layer for block in blocks for layer in block.modules() if type(layer) in STORED}
    layers: list[Any] = list(network.modules())
    for layer in layers:
        if layer in kept and layer.weight.dtype in FLOAT8:
            hold(layer, None)
            own = [layer.bias] if layer.bias is not None else []
        elif is_adaptable(layer) and type(layer) not in STORED:
            own = []
        else:
            own = list(layer.parameters(recurse=False))
        for value in (*own, *layer.buffers(recurse=False)):
            value.data = value.data.to(dtype) if value.dtype in FLOAT8 else value.data


@torch.no_grad()
def store(layer: Any, kind: torch.dtype = torch.float8_e4m3fn, scaled: bool = True) -> None:
    """Put a linear or convolution layer's weight into float8, in place. scaled: with a scale for each output row, so
    that its largest number is float8's largest; otherwise every number as it is, and no larger."""
    weight, most = layer.weight.data, LARGEST[kind]
    scale = None
    if scaled:
        largest = weight.float().flatten(1).abs().amax(1).clamp_min(1e-12)
        scale = (largest / most).reshape(-1, *[1] * (weight.ndim - 1))
        weight = weight.float() / scale
    layer.weight = nn.Parameter(weight.clamp(-most, most).to(kind), requires_grad=False)
    hold(layer, scale)


def hold(layer: Any, scale: Tensor | None) -> None:
    """Make a linear or convolution layer whose weight is float8 compute with it. scale: None = 1, or float32 [] or
    [out, 1, ...]."""
    layer.__class__ = STORED[type(layer)]
    layer.register_buffer("weight_scale", scale)


def widened(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W = s Q in ``dtype``."""
    wide = stored.to(dtype)
    return wide if scale is None else wide * scale.to(wide)


def weight_of(layer: Any) -> Tensor:
    """The numbers in float32 that a layer's weight stands for, whatever it is stored as."""
    weight = layer.weight.detach()
    scale = layer.weight_scale if type(layer) in STORED.values() else None
    wide = widened(weight, scale, torch.float32)
    return wide if type(wide) is Tensor else wide.dequantize()


def _wide(ctx: Any, like: Tensor) -> Tensor:
    """The weight that a function has saved, in the dtype of ``like``."""
    stored, scale = ctx.saved_tensors
    return widened(stored, scale, like.dtype)


class StoredLinear(nn.Linear):
    weight_scale: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return _Linear.apply(input, self.weight, self.weight_scale, self.bias)  # type: ignore[no-any-return]


class StoredConv2d(nn.Conv2d):
    weight_scale: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        geometry = self.stride, self.padding, self.dilation, self.groups
        return _Conv2d.apply(input, self.weight, self.weight_scale, self.bias, geometry)  # type: ignore[no-any-return]


STORED: dict[type[nn.Module], Any] = {nn.Linear: StoredLinear, nn.Conv2d: StoredConv2d}


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, stored: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.linear(x, widened(stored, scale, x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])
        ctx.save_for_forward(*inputs[1:3])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # dx = dy W
        return gradients[0] @ _wide(ctx, gradients[0]), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return F.linear(tangents[0], _wide(ctx, tangents[0]))


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, stored: Tensor, scale: Tensor | None, bias: Tensor | None, geometry: tuple[Any, ...]
    ) -> Tensor:
        return F.conv2d(x, widened(stored, scale, x.dtype), bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])
        ctx.save_for_forward(*inputs[1:3])
        ctx.shape, ctx.geometry = inputs[0].shape, inputs[4]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        dx = conv2d_input(ctx.shape, _wide(ctx, gradients[0]), gradients[0], *ctx.geometry)
        return dx, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return F.conv2d(tangents[0], _wide(ctx, tangents[0]), None, *ctx.geometry)
