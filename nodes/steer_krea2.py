"""Krea 2, steered: its blocks that fuse a text refine each of several as if it were the only one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .steer_attention import Attend, JointAttention, followed


@dataclass
class FusedAttention:
    """The attention override. joint: of [texts, picture]. lengths: tokens of each text. batch: rows of the forward."""

    joint: JointAttention
    lengths: tuple[int, ...]
    batch: int

    def __call__(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, heads: int, *mask: Any, **rest: Any) -> Tensor:
        """In the stream alone the network tells where its picture is."""
        if "img_slice" in (rest.get("transformer_options") or {}):
            return self.joint(attend, q, k, v, heads, *mask, **rest)
        look = followed(self.joint.earlier, attend)
        if len(q) != self.batch:  # over the layers of each token
            return look(q, k, v, heads, *mask, **rest)
        tokens = 2 if rest.get("skip_reshape") else 1
        texts = zip(*(part.split(self.lengths, tokens) for part in (q, k, v)), strict=True)
        found = [look(*text, heads, *mask, **rest) for text in texts]
        return torch.cat(found, 2 if rest.get("skip_output_reshape") else 1)
