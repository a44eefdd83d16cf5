"""Qwen-Image's attention of two streams, steered: it turns queries and keys itself, by places that a forward gives."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch import Tensor

from .steer_attention import JointSteered
from .steer_run import Run


class QwenSteered:
    """Steers one attention of texts and picture. Each text's tokens follow the picture's places as if it were the only
    text."""

    def __init__(self, inner: Any, run: Run) -> None:
        self.inner, self.joint = inner, JointSteered(inner, run)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        if not self.joint.run.acting:
            given = encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
            return self.inner(attn, hidden_states, *given)  # type: ignore[no-any-return]
        of_picture, of_text = image_rotary_emb
        text = turned(self.joint.projected(attn, encoder_hidden_states, "added_"), self._places(of_text))
        picture = turned(self.joint.projected(attn, hidden_states, ""), of_picture)
        q, k, v = (torch.cat([a, b], 2) for a, b in zip(text, picture, strict=True))
        positive, negative, image = self.joint.attended(q, k, v, hidden_states)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(torch.cat([positive, negative], 1))

    def _places(self, of_text: Tensor) -> Tensor:
        """[L, D / 2] of the prompt's, the negative's and the empty text's tokens, of those of as many tokens of one."""
        run = self.joint.run
        lengths = run.positive_tokens, run.away.tokens.shape[1] - run.away.empty, run.away.empty
        return torch.cat([of_text[:length] for length in lengths])


def turned(parts: tuple[Tensor, Tensor, Tensor], angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [B, H, N, D] by ``angles`` [N, D / 2], complex; values as they are."""
    q, k, v = parts
    q, k = (apply_rotary_emb_qwen(part.transpose(1, 2), angles, use_real=False).transpose(1, 2) for part in (q, k))
    return q, k, v
