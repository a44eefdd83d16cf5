"""A host's GEGLU layers, served by `kernels.gated` for as long as a network is trained.

A layer stands in the place of the host's for that while. The projection in it is the host's own module, with whatever
hangs on it: adapters, hooks, another storage of its weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.gated import gated

NAME = "GEGLU"
"""Of the layer's class in diffusers and in ComfyUI alike."""
PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Gated(nn.Module):
    """h gelu(g), [h, g] = W x: keeps W x for backward, where the host's form keeps gelu(g) beside it."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return gated(self.proj(x))


@contextmanager
def gated_layers(network: nn.Module) -> Iterator[int]:
    """Within, the network's GEGLU layers are `Gated`; how many. One that computes something else, or that anything
    hangs on, stays as it is."""
    known: dict[type, bool] = {}
    found: list[tuple[nn.Module, str, Any]] = [
        (parent, name, layer)
        for parent in network.modules()
        for name, layer in parent.named_children()
        if _serves(layer, known)
    ]
    for parent, name, layer in found:
        parent._modules[name] = Gated(layer.proj).train(layer.training)
    try:
        yield len(found)
    finally:
        for parent, name, layer in found:
            parent._modules[name] = layer


def _serves(layer: nn.Module, known: dict[type, bool]) -> bool:
    """Whether `Gated` is what a layer computes; by its first one of a class."""
    if type(layer).__name__ != NAME or [*dict(layer.named_children())] != ["proj"] or _hung(layer):
        return False
    if type(layer) not in known:
        known[type(layer)] = _alike(layer)
    return known[type(layer)]


def _hung(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or "forward" in vars(layer))


@torch.inference_mode(False)
@torch.no_grad()
def _alike(layer: Any) -> bool:
    """By what both give for three tokens. The meta device has no numbers: there the name has to do."""
    weight = next(layer.parameters())
    if weight.is_meta:
        return True
    width = getattr(layer.proj, "in_features", weight.shape[-1])
    # a stored weight does not say what it computes in; its bias does
    dtype = next((value.dtype for value in layer.parameters() if value.dtype in PLAIN), torch.bfloat16)
    x = torch.linspace(-1, 1, 3 * width, dtype=torch.float32).view(1, 3, width).to(weight.device, dtype)
    try:
        ours, theirs = Gated(layer.proj)(x).float(), layer(x).float()
    except Exception:  # a layer that cannot be tried is the host's own
        return False
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 2e-2 * theirs.abs().max())
