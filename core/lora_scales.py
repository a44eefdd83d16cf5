"""The alphas of a LoRA file: kohya's tensors beside the factors, and peft's settings in the header."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .errors import OneStepError

MOST = 1e6
"""The largest alpha believed: thousands of times the largest rank."""


def alpha_of(alpha: Tensor, path: str) -> float:
    """Of a tensor that must hold one number."""
    if alpha.numel() != 1:
        raise OneStepError(
            f"The LoRA's alpha of {path[:120]!r} holds {alpha.numel()} numbers in place of one: export it again."
        )
    return _checked(alpha.double().item(), path)


class PeftScales:
    """alpha / rank as diffusers reads it from peft's settings in the header; 1 where there are none.

    The keys are "transformer.r", "unet.lora_alpha" ...; those of text encoders do not concern us.
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        pattern = re.compile(r"(?:unet|transformer)\.(\w+)")
        told = _table(metadata.get("lora_adapter_metadata", "{}"))
        self._told = {found[1]: value for key, value in told.items() if (found := pattern.fullmatch(key))}
        self._alphas = self._told.get("alpha_pattern") or {}
        if not isinstance(self._alphas, dict):
            raise OneStepError(
                f"The LoRA's alpha_pattern is {self._alphas!r:.80}, which is no table of layers: export it again."
            )

    def of(self, path: str, rank: int) -> float:
        alphas = [value for name, value in self._alphas.items() if f".{path}".endswith("." + name)]
        alpha = alphas[0] if alphas else self._told.get("lora_alpha")
        if alpha is None:
            return 1.0
        return _checked(alpha, path) / (rank**0.5 if self._told.get("use_rslora") else rank)


def _table(text: str) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise OneStepError(
            f"The LoRA's lora_adapter_metadata is {text!r:.80}, which is no table of settings: export it again."
        )
    return told


def _checked(alpha: Any, path: str) -> float:
    plain = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not plain or not -MOST <= alpha <= MOST or math.isnan(alpha):
        raise OneStepError(
            f"The LoRA's alpha of {path[:120]!r} is {alpha!r:.40}, which is no number up to {MOST:g}: export it again."
        )
    return float(alpha)
