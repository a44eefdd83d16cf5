"""Layers as bitsandbytes stores them."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import nn


def stored(layer: nn.Linear, kind: str) -> nn.Module:
    """``layer`` as diffusers' bitsandbytes quantiser makes it. kind: "nf4" or "int8"."""
    bias = layer.bias is not None
    if kind == "nf4":
        made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias, torch.float32, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(layer.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    else:
        made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(layer.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.to("cpu").requires_grad_(False)  # type: ignore[no-any-return]
