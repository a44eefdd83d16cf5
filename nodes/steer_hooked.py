"""PixArt-Sigma, steered: its cross-attention asks none of ComfyUI's patches, so that forward hooks steer it.

They see the picture's queries and the prompt's keys and values where these are made, and what was found before its
output projection, where it is pushed away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from .steer_attention import steered
from .steer_modulation import hang


def steer_hooked(call: Any, options: dict[str, Any]) -> Tensor:
    """Makes keys and values of the negative of a `steer_networks.Call`, once in a run: no time is in them."""
    if not call.kept:
        text = call.network.y_embedder(call.tokens, False)  # no caption is dropped
        for number, block in enumerate(call.network.blocks):
            # by the block's own projection: whatever LoRA is on it acts
            call.kept["block", number, 0] = block.cross_attn.kv_linear(text).chunk(2, -1)
    context: Tensor = call.context
    return context


@contextmanager
def hooked_cross(call: Any, options: dict[str, Any]) -> Iterator[None]:
    """Within, each cross-attention of the call's network is pushed away from its negative."""
    with ExitStack() as hooks:
        for number, block in enumerate(call.network.blocks):
            CrossHooks(call, call.kept["block", number, 0]).install(block.cross_attn, hooks)
        yield


class CrossHooks:
    """Of one cross-attention. negative: keys and values [n, L', C]."""

    def __init__(self, call: Any, negative: tuple[Tensor, Tensor]) -> None:
        self.call, self.negative = call, negative
        self.q = self.k = self.v = torch.empty(0)

    def install(self, attention: Any, hooks: ExitStack) -> None:
        self.heads = attention.num_heads
        hang(hooks, attention.q_linear, self.queries)
        hang(hooks, attention.kv_linear, self.keys_values)
        hooks.callback(attention.proj.register_forward_pre_hook(self.push).remove)

    def queries(self, module: Any, given: Any, out: Tensor) -> None:
        self.q = out

    def keys_values(self, module: Any, given: Any, out: Tensor) -> None:
        """out: of the whole batch's texts, in one row."""
        self.k, self.v = out.reshape(len(self.call.x), -1, out.shape[-1]).chunk(2, -1)

    def push(self, module: Any, given: tuple[Tensor]) -> tuple[Tensor]:
        """given: what the prompt has, [B, N, C]."""
        call, (found,) = self.call, given
        call.reached.once = True
        negative = call.spread(self.negative[0]), call.spread(self.negative[1])

        def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return optimized_attention(q, k, v, self.heads)

        known = None if call.steering.mode == "vsf" else found  # it computes the prompt's anew, in one softmax
        pushed = steered(call.steering, look, (self.q, self.k, self.v), negative, call.empty, self.heads, None, known)
        self.q = self.k = self.v = torch.empty(0)
        return (pushed if call.rows is None else torch.where(call.rows[:, None, None], pushed, found),)
