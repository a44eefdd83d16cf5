"""An attention that a processor runs on, and what it has asked of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .heads import normed_heads


class Seen:
    """An Attention that ends before its output projection, for a processor to run on; queries, keys and values that
    the processor asks for are remembered."""

    residual_connection = False
    rescale_output_factor = 1.0

    def __init__(self, attn: Any) -> None:
        self.attn = attn
        self.to_out = (_same, _same)
        self.found: dict[str, Tensor] = {}
        self.fused = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attn, name)

    def to_q(self, states: Tensor) -> Tensor:
        return self._see("q", self.attn.to_q(states))

    def to_k(self, states: Tensor) -> Tensor:
        return self._see("k", self.attn.to_k(states))

    def to_v(self, states: Tensor) -> Tensor:
        return self._see("v", self.attn.to_v(states))

    def to_kv(self, states: Tensor) -> Tensor:
        self.fused = True
        both = self.attn.to_kv(states)
        self.found["k"], self.found["v"] = both.chunk(2, -1)
        return both

    def _see(self, name: str, states: Tensor) -> Tensor:
        self.found.setdefault(name, states)
        return states

    def in_heads(self, name: str) -> Tensor:
        """ "q", "k" or "v" as attention sees it, [B, H, N, D]."""
        norm = None if name == "v" else getattr(self.attn, f"norm_{name}")
        return normed_heads(self.found[name], self.attn, norm)


def _same(states: Tensor) -> Tensor:
    return states
