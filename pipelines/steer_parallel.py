"""FLUX.2's single blocks, steered: one product makes queries, keys, values and the feed-forward's input."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from .heads import heads, normed
from .steer_attention import JointSteered
from .steer_run import Run


class ParallelSteered:
    """Steers one attention of texts and picture in one sequence, with the feed-forward beside it."""

    def __init__(self, inner: Any, run: Run) -> None:
        self.inner, self.joint = inner, JointSteered(inner, run)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        if not self.joint.run.acting:
            return self.inner(attn, hidden_states, attention_mask, image_rotary_emb)  # type: ignore[no-any-return]
        sizes = [attn.inner_dim] * 3 + [attn.mlp_mult_factor * attn.mlp_hidden_dim]
        q, k, v, mlp = attn.to_qkv_mlp_proj(hidden_states).split(sizes, 2)
        q, k, v = (heads(part, attn) for part in (q, k, v))
        q, k = (normed(part, norm) for part, norm in ((q, attn.norm_q), (k, attn.norm_k)))
        q, k = (apply_rotary_emb(part, image_rotary_emb, sequence_dim=2) for part in (q, k))
        found = torch.cat(self.joint.attended(q, k, v, hidden_states), 1)
        return attn.to_out(torch.cat([found, attn.mlp_act_fn(mlp)], 2))  # type: ignore[no-any-return]
