"""What a host made of a batch of prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, rms_norm

from .errors import OneStepError
from .sending import sent


@dataclass(frozen=True)
class Cond:
    """Conditions of B samples.

    text: [B, L, C] text tokens. mask: [B, L] bool, True where a token is real; None when all are.
    pooled: [B, P] the pooled text. size: [B, 6] height, width, crop top, crop left, target height, target width, in
    pixels.
    guidance: [B] the guidance scale that an embedded-guidance model (Flux-dev) is told.
    """

    text: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    size: Tensor | None = None
    guidance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    @property
    def summary(self) -> Tensor:
        """[B, P] of each text: its pooled text or, where there is none, the mean of its real tokens, each brought to a
        root mean square of 1, as a language model's first token is far longer than all others."""
        if self.pooled is not None:
            return self.pooled
        tokens = rms_norm(self.text.to(torch.promote_types(self.text.dtype, torch.float32)), self.text.shape[2:])
        if self.mask is None:
            return tokens.mean(1)
        real = self.mask.to(tokens)[:, :, None]
        return (tokens * real).sum(1) / real.sum(1)

    def __getitem__(self, index: Any) -> Cond:
        """The samples at ``index``, a slice or a tensor of positions."""
        return self._map(lambda value: value[index])

    def to(self, *args: Any) -> Cond:
        """On a device and / or in a dtype, as :meth:`torch.Tensor.to`; the mask stays boolean."""
        mask = None if self.mask is None else self.mask.to(*args).bool()
        return replace(self._map(lambda value: value.to(*args)), mask=mask)

    def sent(self, device: torch.device, dtype: torch.dtype | None = None) -> Cond:
        """The same, from the host's memory to a card that is not waited for."""
        mask = None if self.mask is None else sent(self.mask, device)
        return replace(self._map(lambda value: sent(value, device, dtype)), mask=mask)

    def repeat(self, times: int) -> Cond:
        """Sample 0 ``times`` times, then sample 1, ..."""
        return self._map(lambda value: value.repeat_interleave(times, 0))

    def with_(self, **changes: Tensor | None) -> Cond:
        """The same prompts with another ``size`` or ``guidance``."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def null_like(self, null: Cond) -> Cond:
        """The one condition ``null`` for each of these samples, at these sizes and under the same embedded guidance."""
        return replace(null[:1].repeat(len(self)), size=self.size, guidance=self.guidance)

    def fingerprint(self) -> str:
        """A hash of every value: equal conditions have equal fingerprints, whatever device they lie on."""
        digest = hashlib.sha256()
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None:
                value = value.detach().cpu().contiguous()
                digest.update(f"{entry.name}{tuple(value.shape)}{value.dtype}".encode())
                digest.update(value.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def concat(parts: Sequence[Cond]) -> Cond:
        """All samples of ``parts`` in order. Texts of different lengths are padded under a mask, which leaves them
        exact."""
        length = max(part.text.shape[1] for part in parts)
        ragged = any(part.text.shape[1] != length or part.mask is not None for part in parts)
        padded = [part._padded(length) if ragged else part for part in parts]
        joined: dict[str, Any] = {
            entry.name: _join([getattr(part, entry.name) for part in padded], entry.name) for entry in fields(Cond)
        }
        return Cond(**joined)

    def _padded(self, length: int) -> Cond:
        missing = length - self.text.shape[1]
        mask = torch.ones_like(self.text[:, :, 0], dtype=torch.bool) if self.mask is None else self.mask
        return replace(self, text=pad(self.text, (0, 0, 0, missing)), mask=pad(mask, (0, missing)))

    def _map(self, change: Any) -> Cond:
        present = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values: dict[str, Any] = {name: None if value is None else change(value) for name, value in present.items()}
        return Cond(**values)


def _join(values: list[Tensor | None], name: str) -> Tensor | None:
    present = [value for value in values if value is not None]
    if present and len(present) != len(values):
        raise OneStepError(f"conditions cannot be joined: {name} is given for {len(present)} of {len(values)} of them")
    return torch.cat(present) if present else None
