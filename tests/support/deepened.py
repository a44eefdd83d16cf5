"""Transformers of more blocks than the least, so that they do not fit into a ring of two."""

from __future__ import annotations

import copy
from typing import Any

import torch

KINDS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")
EACH = 3
"""Blocks that are put before the first of each kind."""


def deepened(network: Any) -> Any:
    """``network`` with more joint, double and single blocks, of weights of their own; a U-Net as it is."""
    if "approximator_num_channels" in network.config:
        return _of_more_modulations(network)
    draw = torch.Generator().manual_seed(5)
    for kind in KINDS:
        blocks = getattr(network, kind, [])
        for _ in range(EACH if len(blocks) else 0):
            block = copy.deepcopy(blocks[0])
            for parameter in block.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw).to(parameter)
            blocks.insert(0, block)
    first = next((kind for kind in KINDS if hasattr(network, kind)), "")
    layers = {"num_layers": first, "num_single_layers": "single_transformer_blocks"}
    told = {name: len(getattr(network, kind)) for name, kind in layers.items() if name in network.config}
    if network.config.get("dual_attention_layers"):
        told["dual_attention_layers"] = tuple(range(EACH + 1))  # copies of the first, which attends twice
    if first:
        network.register_to_config(**told)
    return network


def _of_more_modulations(network: Any) -> Any:
    """Chroma, whose one small network makes as many modulations as all blocks need."""
    kinds = ("num_layers", "num_single_layers")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        deeper = type(network).from_config({**network.config, **{kind: network.config[kind] + EACH for kind in kinds}})
    return deeper.to(network.dtype).requires_grad_(False)
