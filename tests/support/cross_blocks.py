"""Two blocks of a U-Net with a cross-attention each, and their layers as targets under a U-Net's names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onestep.core.roles import Roles
from onestep.core.targets import Target


class Block(nn.Module):
    """tanh(attn2(x, text))."""

    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.attn2 = attention()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return torch.tanh(self.attn2(x, text))


def cross_blocks(attention: type[nn.Module], seed: int = 0) -> tuple[nn.ModuleList, Roles]:
    """In float64, frozen, from a seed of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = nn.ModuleList([Block(attention), Block(attention)]).double().requires_grad_(False)
    names = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
    targets = [Target(f"mid.{at}.{name}", blocks[at].get_submodule(name)) for at in (0, 1) for name in names]
    return blocks, Roles(targets)
