"""What a call gives a network of diffusers, in the dtype and on the device of its latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.cond import Cond


@dataclass(frozen=True)
class Extras:
    """What a call gives a network beside latents, time and text.

    image_embeds: an IP-Adapter's, one tensor an adapter, its rows those of the network's batch or the first of more.
    attention: cross_attention_kwargs of a U-Net, joint_attention_kwargs of a transformer, as diffusers has them.
    """

    image_embeds: tuple[Tensor, ...] = ()
    attention: Mapping[str, Any] | None = None

    def images(self, x: Tensor) -> list[Tensor]:
        return [rows[: len(x)].to(x.device) for rows in self.image_embeds]


def in_dtype(cond: Cond, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    pooled = None if cond.pooled is None else cond.pooled.to(x.device, dtype)
    return cond.text.to(x.device, dtype), pooled


def moved(value: Tensor | None, x: Tensor) -> Tensor | None:
    return None if value is None else value.to(x.device, torch.float32)


def joint_mask(mask: Tensor | None, x: Tensor, patches: int) -> dict[str, Any]:
    """[B, 1, 1, L + patches]: text tokens as masked, every patch seen."""
    if mask is None:
        return {}
    seen = torch.ones(len(mask), patches, dtype=torch.bool, device=x.device)
    return {"attention_mask": torch.cat([mask.to(x.device), seen], 1)[:, None, None]}
