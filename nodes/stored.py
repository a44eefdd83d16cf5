"""ComfyUI's layers that cast, dequantise or fetch their weight at each use: nothing of that waits for backward.

    y = x W^T + bias,   dx = dy W,   W: the weight as ComfyUI makes it for a product, made again for backward

Without this autograd keeps each made weight until backward: a whole base in the computing dtype beside the stored one.

ComfyUI's fast products of fp8 and int8 layers round x as well, to 3 or 7 bits. In training x is left as it is: the
matching term is a difference of two nearly equal outputs, of which such rounding leaves little
(benchmarks/results/half-precision.md). All other layers compute by their own forward.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from ..core.errors import OneStepError
from ..core.stored import FLOAT8, is_plain
from ..core.targets import is_adaptable, is_conv
from ..kernels.attention import in_forward_ad


def keep_stored(network: nn.Module) -> None:
    """Make the linear and convolution layers of a private ``network`` keep what is stored, and no more. Other quantised
    ones, tables of tokens, can be moved."""
    for layer in network.modules():
        kind: Any = type(layer)
        if isinstance(layer, comfy.ops.CastWeightBiasOp) and is_adaptable(layer):
            layer.__class__ = _keeping(kind)
        elif is_quantised(getattr(layer, "weight", None)):
            layer.__class__ = _moving(kind)


@cache
def _moving(kind: Any) -> Any:
    """The layer's class, of the same name, whose quantised weight can be moved in inference mode."""

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        # ComfyUI moves models in inference mode, in which an ordinary quantised tensor cannot be wrapped again
        with torch.inference_mode(False):
            return kind._apply(self, fn, recurse)

    return type(kind.__name__, (kind,), {"_apply": _apply, "__module__": kind.__module__})


@cache
def _keeping(kind: Any) -> Any:
    """`_moving`, whose product goes through `_Kept` where its weight is made for it."""

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        _settle(self, input)
        if _as_it_is(self, input) or not (_differentiated(input) or _rounds(self)):
            return kind.forward(self, input, *args, **kwargs)
        return _Kept.apply(input, self, kind)

    return type(kind.__name__, (_moving(kind),), {"forward": forward, "__module__": kind.__module__})


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


def _rounds(layer: Any) -> bool:
    """Whether its own product may round the layer's input."""
    return isinstance(layer, comfy.ops.fp8_ops.Linear) or is_quantised(layer.weight)


def made(layer: Any, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """W and the bias of a layer in the dtype and on the device of ``like``, as ComfyUI makes them."""
    told = {"dtype": like.dtype, "device": like.device, "bias_dtype": like.dtype}
    weight, bias = comfy.ops.cast_bias_weight(layer, **told)
    weight = weight if is_plain(weight) else weight.dequantize()
    # NVIDIA's ModelOpt smooths the inputs of some layers
    smooth = getattr(layer, "pre_quant_scale", None)
    return weight.to(like) if smooth is None else weight.to(like) * smooth.to(like), bias


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, layer: Any, kind: Any) -> Tensor:
        if _rounds(layer):
            return F.linear(x, *made(layer, x))
        return kind.forward(layer, x.detach())  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.layer, _ = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        dy, layer = gradients[0], ctx.layer
        weight, _ = made(layer, dy)
        if is_conv(layer):
            geometry = layer.stride, layer.padding, layer.dilation, layer.groups
            return conv2d_input(ctx.shape, weight, dy, *geometry), None, None
        # dx = dy W
        return dy @ weight, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        dx, layer = tangents[0], ctx.layer
        weight, _ = made(layer, dx)
        if is_conv(layer):
            return F.conv2d(dx, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.linear(dx, weight)


# -- without numbers ---------------------------------------------------------------------------------------------------


def is_quantised(weight: Any) -> bool:
    """Whether it is a quantised tensor of ComfyUI's."""
    return isinstance(weight, QuantizedTensor)


def hollow_weight(weight: Any) -> Tensor:
    """A weight of its shape on the meta device that takes no room, and is widened for each product."""
    return torch.empty((), dtype=torch.float8_e4m3fn, device="meta").expand(weight.shape)


def take_room(layer: Any, like: Any) -> None:
    """A hollow ``layer`` takes the room on the meta device that the quantised weight of ``like`` has."""
    weight: Any = getattr(like, "weight", None)
    if not is_quantised(weight):
        return
    layer.layout_type = None  # its products are plain
    inner = [weight._qdata, *(value for value in vars(weight._params).values() if isinstance(value, Tensor))]
    layer.register_buffer("stored", torch.empty(sum(value.nbytes for value in inner), dtype=torch.uint8, device="meta"))


# -- what cannot be trained -------------------------------------------------------------------------------------------


def refuse_foreign(network: nn.Module) -> None:
    """Raise for weights that another pack's loader keeps in a form of its own, which only its layers can read."""
    for name, layer in network.named_modules():
        # some packs' layers have no weight at all, but a qweight
        weight: Any = getattr(layer, "weight", None)
        if not is_adaptable(layer) or is_plain(weight) or _is_comfys(weight):
            continue
        kind = "no weight" if weight is None else f"{type(weight).__name__} {weight.dtype}"
        what = "a GGUF file's" if "ggml" in kind.lower() else "another pack's loader's"
        raise OneStepError(
            f"{name[-80:]} of this MODEL holds {kind[:60]}, {what} own form of weights, which cannot be trained on: "
            "load the model with ComfyUI's own loaders, from a .safetensors file in fp16, bf16, fp8 or one of "
            "ComfyUI's own formats; the LoRA then works on this MODEL as well"
        )


def _is_comfys(weight: Any) -> bool:
    """A quantised tensor of ComfyUI's, or plain fp8."""
    return is_quantised(weight) or (
        type(weight) is nn.Parameter and type(weight.data) is Tensor and weight.dtype in FLOAT8
    )


def refuse_broken(network: nn.Module) -> None:
    """Raise where a quantised layer's scale is no finite number: its weight would be none either."""
    for name, layer in network.named_modules():
        weight: Any = getattr(layer, "weight", None)
        if not is_adaptable(layer) or not is_quantised(weight):
            continue
        scales = [value for value in vars(weight._params).values() if isinstance(value, Tensor)]
        if not all(bool(value.float().isfinite().all()) for value in scales):
            raise OneStepError(
                f"{name[-80:]} of this MODEL is quantised, and its scale is not a finite number (NaN or infinite): "
                "download or quantise the file again"
            )
