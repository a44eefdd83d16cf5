"""Ordinary tensors in the place of inference tensors, which autograd refuses, and which cannot be moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.inference_mode(False)
def make_ordinary(network: nn.Module) -> None:
    """Replace the inference tensors of ``network`` by copies; tied ones stay tied.

    A load or a move under `torch.inference_mode` leaves such tensors behind, as servers and notebooks do.
    """
    copies: dict[int, tuple[Tensor, Tensor]] = {}  # the tensor itself is kept, so that its id stays its own
    for module in network.modules():
        own: list[tuple[str, Any]] = [*module.named_parameters(recurse=False, remove_duplicate=False)]
        own += module.named_buffers(recurse=False, remove_duplicate=False)
        for name, value in own:
            if value.is_inference():
                _, copy = copies.setdefault(id(value), (value, _copied(value)))
                setattr(module, name, copy)


def _copied(value: Tensor) -> Tensor:
    copy = value.detach().clone()
    return nn.Parameter(copy, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else copy
