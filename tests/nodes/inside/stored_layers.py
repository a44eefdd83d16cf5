"""stored_layers.py: ComfyUI's layers, each way of storing, as `keep_stored` leaves them; one line of JSON."""

import json
import sys
from pathlib import Path

import comfy.ops
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))
import quantised_files

from onestep.nodes.stored import keep_stored, made


def quantised(kind, emulated, smooth):
    """A linear layer of a comfy-kitchen format, as ComfyUI loads it."""
    name = quantised_files.KITCHEN[kind][0]
    operations = comfy.ops.mixed_precision_ops(
        {"mixed_ops": True}, torch.float32, disabled={name} if emulated else set()
    )
    layer = operations.Linear(128, 64, device="cpu", dtype=torch.float32)
    keys, numbers = quantised_files.kitchen("weight", torch.randn(64, 128) / 11, kind)
    more = {"pre_quant_scale": torch.rand(128) + 0.5} if smooth else {}
    layer.load_state_dict({**keys, "bias": torch.randn(64), **more}, strict=False)
    assert not smooth or layer.pre_quant_scale is not None
    return layer, numbers * more["pre_quant_scale"] if smooth else numbers, torch.randn(2, 5, 128)


def cast(kind, dtype):
    """A layer that casts its plain weight at each use."""
    make, shape = {
        "linear": (lambda: comfy.ops.manual_cast.Linear(128, 64), (2, 5, 128)),
        "convolution": (lambda: comfy.ops.manual_cast.Conv2d(6, 8, 3, stride=2, padding=1, dilation=1), (2, 6, 9, 8)),
        "fast fp8": (lambda: comfy.ops.fp8_ops.Linear(128, 64), (2, 5, 128)),
    }[kind]
    layer = make()
    for value in layer.parameters():
        value.data = (torch.randn(value.shape) / 11).to(dtype)
    return layer, layer.weight.float(), torch.randn(shape)


def measured(layer, numbers, x):
    """How a forward and a backward go, against the layer's own and against the numbers that its weight stands for."""
    layer.requires_grad_(False)
    before = x.clone()
    with torch.no_grad():
        own = layer(x.clone())
    keep_stored(layer)
    kept = []
    given = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        y = layer(given)
    with torch.no_grad():
        same = bool(torch.equal(layer(x), y))
    dy = torch.randn(y.shape)
    y.backward(dy)
    twin = before.clone().requires_grad_()
    bias = None if layer.bias is None else layer.bias.float()
    if numbers.ndim == 4:
        wanted = torch.nn.functional.conv2d(twin, numbers, bias, layer.stride, layer.padding)
    else:
        wanted = torch.nn.functional.linear(twin, numbers, bias)
    wanted.backward(dy)
    along = torch.randn(x.shape)
    tangent = torch.func.jvp(layer, (x.clone(),), (along,))[1]
    return {
        "same": same,
        "own": float((y.detach() - own).abs().max() / own.abs().max()),
        "forward": float((y - wanted).detach().abs().max() / wanted.detach().abs().max()),
        "gradient": float((given.grad - twin.grad).abs().max() / twin.grad.abs().max()),
        "tangent": abs(float((tangent * dy).sum() / (along * twin.grad).sum()) - 1),
        "kept": sum(kept),
        "untouched": bool(torch.equal(given.detach(), before)),
        "weight": float((made(layer, x)[0].float().reshape(numbers.shape) - numbers).abs().max()),
    }


torch.manual_seed(0)
told = {}
for kind in quantised_files.KITCHEN:
    for emulated in (True, False):
        if kind == "mxfp8" and not emulated:
            continue  # its products are a card's alone
        told[f"{kind} {'emulated' if emulated else 'native'}"] = measured(*quantised(kind, emulated, False))
told["nvfp4 smoothed"] = measured(*quantised("nvfp4", True, True))
for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16):
    for kind in ("linear", "convolution"):
        told[f"{kind} {dtype}"] = measured(*cast(kind, dtype))
told["fast fp8 linear"] = measured(*cast("fast fp8", torch.float8_e4m3fn))

# a weight that is cast to another dtype of its size is stored as that, once
layer = comfy.ops.manual_cast.Linear(128, 64)  # whose weights are whatever lies there
for value in layer.parameters():
    torch.nn.init.normal_(value)
layer = layer.to(torch.float16).requires_grad_(False)
x = torch.randn(3, 128).bfloat16()
own = layer(x)
keep_stored(layer)
same = bool(torch.equal(layer(x), own))
told["settled"] = {"same": same, "dtype": str(layer.weight.dtype), "bias": str(layer.bias.dtype)}
print(json.dumps(told))
