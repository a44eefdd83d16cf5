"""Flux' attention in training: norm and rotary embedding of queries and keys in one pass, by `kernels.normed_rotary`.

diffusers' own processor does the rest. It is handed norms that also turn their rows, and no rotary embedding: a row is
turned by its own place alone, before text and picture are put together as well as after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from ..kernels import normed_rotary

NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


class FusedFlux(FluxAttnProcessor):
    """backend, parallel: those of the processor in whose place it stands."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self._attention_backend, self._parallel_config = inner._attention_backend, inner._parallel_config

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if image_rotary_emb is not None and _served(attn):
            text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
            attn, image_rotary_emb = Turning(attn, image_rotary_emb, text), None
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


class Turning:
    """An attention whose norms turn, too. angles: cos and sin [S, D] of all rows, of which the text's come first."""

    def __init__(self, attn: Any, angles: tuple[Tensor, Tensor], text: int) -> None:
        self._attn, self._angles, self._text = attn, angles, text

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._attn, name)
        if name not in NORMS:
            return found
        return self._turned(found, slice(0, self._text) if "added" in name else slice(self._text, None))

    def _turned(self, norm: Any, rows: slice) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            cos, sin = (angle[rows].to(x.device) for angle in self._angles)
            eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
            return normed_rotary(x, norm.weight, cos, sin, eps)

        return call


def _served(attn: Any) -> bool:
    """Whether its norms are plain ones, on which nothing hangs."""
    norms = [norm for name in NORMS if (norm := getattr(attn, name, None)) is not None]
    return all(type(norm) is nn.RMSNorm and norm.weight is not None and not _hung(norm) for norm in norms)


def _hung(norm: nn.Module) -> bool:
    return bool(norm._forward_hooks or norm._forward_pre_hooks)


@contextmanager
def fused_attention(network: Any) -> Iterator[int]:
    """Within, those of the network's attentions that have Flux' own processor have this one; how many."""
    before = dict(getattr(network, "attn_processors", {}))
    ours = {name: FusedFlux(inner) for name, inner in before.items() if type(inner) is FluxAttnProcessor}
    if ours:
        network.set_attn_processor({**before, **ours})
    try:
        yield len(ours)
    finally:
        if ours:
            network.set_attn_processor(before)
