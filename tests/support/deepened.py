"""Transformers of more blocks than the least, so that they do not fit into a ring of two."""

from __future__ import annotations

import copy
from typing import Any

import torch

EACH = 3
"""Blocks that are put before the first of each kind."""


def deepened(network: Any) -> Any:
    """``network`` with more joint, double and single blocks, of weights of their own; a U-Net as it is."""
    draw = torch.Generator().manual_seed(5)
    for kind in ("transformer_blocks", "single_transformer_blocks"):
        blocks = getattr(network, kind, [])
        for _ in range(EACH if len(blocks) else 0):
            block = copy.deepcopy(blocks[0])
            for parameter in block.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw).to(parameter)
            blocks.insert(0, block)
    layers = {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"}
    told = {name: len(getattr(network, kind)) for name, kind in layers.items() if name in network.config}
    if network.config.get("dual_attention_layers"):
        told["dual_attention_layers"] = tuple(range(EACH + 1))  # copies of the first, which attends twice
    if hasattr(network, "transformer_blocks"):
        network.register_to_config(**told)
    return network
