"""diffusers' attention processors, steered: the cross-attention of U-Nets, the joint attention of SD3 and Flux."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.models.attention_processor import (
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    XFormersJointAttnProcessor,
)
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor
from torch import Tensor

from ..core.errors import OneStepError
from ..core.guidance import Streams, texts
from ..kernels import attention
from .heads import heads, merged, normed, normed_heads, repeated
from .seen_attention import Seen
from .steer_modulation import Kept
from .steer_run import Run
from .steer_text import alike

FUSING = (FluxAttnProcessor, Flux2AttnProcessor)
"""Which look at the attention for how it projects."""
JOINT = (JointAttnProcessor2_0, FusedJointAttnProcessor2_0, XFormersJointAttnProcessor, *FUSING)
Projected = tuple[Tensor, Tensor, Tensor]


# -- U-Nets -----------------------------------------------------------------------------------------------------------


class CrossSteered:
    """Steers one cross-attention. inner: the processor that was there; what it adds, as an IP-Adapter's part, stays.

    No module, so that the network's tree, which other threads may be walking through, stays as it is.
    """

    def __init__(self, inner: Any, run: Run) -> None:
        self.inner, self.run = inner, run
        self._kept: tuple[Tensor, Tensor] | None = None

    @classmethod
    def around(cls, inner: Any, run: Run) -> CrossSteered:
        """Of a class of its own, as Attention.forward passes on what the signature of its ``__call__`` names: the inner
        processor's own arguments must reach it."""

        signature = inspect.signature(type(inner).__call__)
        names = list(signature.parameters)[3:]  # behind itself, the attention and the hidden states

        def call(self: CrossSteered, attn: Any, hidden_states: Tensor, *args: Any, **more: Any) -> Tensor:
            return cls.__call__(self, attn, hidden_states, **dict(zip(names, args, strict=False)), **more)

        call.__signature__ = signature  # type: ignore[attr-defined]
        return type(cls.__name__, (cls,), {"__call__": call})(inner, run)  # type: ignore[no-any-return]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        text: dict[str, Any] = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
        if not self.run.acting:
            return self.inner(attn, hidden_states, **text, **more)
        self.run.reached = True
        seen = Seen(attn)
        found = self.inner(seen, hidden_states, **text, **more)
        if not {"q", "k"} <= seen.found.keys():
            name = type(self.inner).__name__
            raise OneStepError(f"{name} attends with projections of its own: steering does not serve it, take it off")
        out = attn.to_out[1](attn.to_out[0](self._steered(attn, seen, found, attention_mask)))
        if getattr(attn, "residual_connection", False):
            out = out + hidden_states
        return out / getattr(attn, "rescale_output_factor", 1.0)

    def _steered(self, attn: Any, seen: Seen, found: Tensor, mask: Tensor | None) -> Tensor:
        """found: [B, N, H D], what the inner processor found in the positive text; its rows are steered."""
        rows = self.run.steered(len(found))
        q, positive = seen.in_heads("q")[rows], heads(found[rows], attn)
        negative = self._negative(attn, seen, len(q))
        vsf = self.run.steering.mode == "vsf"
        if vsf and mask is not None and self.run.positive_lengths is None:
            raise OneStepError("VSF cannot follow a mask over the prompt's tokens: steer by nasa, nag or perp")
        k, v = (seen.in_heads(name)[rows] if vsf else q[:, :, :0] for name in ("k", "v"))
        if (groups := self._groups(len(found), rows)) is None:
            steered = self._away(q, k, v, negative, positive)
        else:
            steered = torch.empty_like(positive)
            for at, own, length in groups:
                away = tuple(self.run.away.shortened(part[at], length) for part in negative)
                steered[at] = self._away(q[at], k[at, :, :own], v[at, :, :own], away, positive[at])
        out = merged(steered).to(found.dtype)
        return out if len(out) == len(found) else torch.cat([found[: rows.start], out, found[rows.stop :]])

    def _groups(self, batch: int, rows: slice) -> list[tuple[Any, ...]] | None:
        """Of the steered rows those of each two numbers of tokens, as `Run.by_lengths`."""
        if self.run.positive_lengths is None and self.run.away.lengths is None:
            return None
        prompts = (self.run.positive_lengths or (self.run.positive_tokens,) * batch)[rows]
        return alike(prompts, self.run.away.each(len(prompts)))

    def _away(self, q: Tensor, k: Tensor, v: Tensor, negative: tuple[Tensor, ...], found: Tensor) -> Tensor:
        """[B, H, N, D]. k, v: of the positive text, which VSF alone reads; ``found`` is what it answered."""
        steering, empty = self.run.steering, self.run.away.empty
        if steering.mode == "vsf":
            return steering.cross(q, k, v, (negative[0], negative[1]), found)
        return steering.apart(found, *(attention(q, *text) for text in texts(negative, empty)))

    def _negative(self, attn: Any, seen: Seen, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the negative, [batch, H, L, D]: each of its rows serves as many pictures in a row."""
        kept = self._kept
        if kept is None:
            kept = self._projected(attn, seen)
            self._kept = kept if self.run.cache and not torch.compiler.is_compiling() else None
        return repeated(kept[0], batch), repeated(kept[1], batch)

    def _projected(self, attn: Any, seen: Seen) -> tuple[Tensor, Tensor]:
        like = seen.found["q"]
        tokens = self.run.away.tokens if self.run.embedded is None else self.run.embedded
        text = tokens.to(like.device, like.dtype)
        text = attn.norm_encoder_hidden_states(text) if getattr(attn, "norm_cross", None) else text
        k, v = attn.to_kv(text).chunk(2, -1) if seen.fused else (attn.to_k(text), attn.to_v(text))
        return normed_heads(k, attn, attn.norm_k), heads(v, attn)


# -- SD3, Flux and FLUX.2 ---------------------------------------------------------------------------------------------


class JointSteered:
    """Steers one joint attention: the tokens of the text are the positive's, then the negative's.

    kept: what gates each text's tokens by its own pooled text, where there is one.
    """

    def __init__(self, inner: Any, run: Run, kept: Kept | None = None) -> None:
        self.inner, self.run, self.kept = inner, run, kept

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if not self.run.acting:
            rotary = {} if image_rotary_emb is None else {"image_rotary_emb": image_rotary_emb}
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, **rotary)
        q, k, v = self.projected(attn, hidden_states, "")
        if encoder_hidden_states is not None:
            text = self.projected(attn, encoder_hidden_states, "added_")
            q, k, v = (torch.cat([a, b], 2) for a, b in zip(text, (q, k, v), strict=True))
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(part, image_rotary_emb, sequence_dim=2) for part in (q, k))
        positive, negative, image = self.attended(q, k, v, hidden_states)
        if encoder_hidden_states is None:
            # Flux' single blocks hold one sequence and project it themselves
            return torch.cat([positive, negative, image], 1)
        texts = torch.cat([positive, negative], 1)
        texts = texts if getattr(attn, "context_pre_only", False) else attn.to_add_out(texts)
        if self.kept is not None and self.kept.gate is not None:
            texts = self.kept.gate * texts
        return attn.to_out[1](attn.to_out[0](image)), texts

    def attended(self, q: Tensor, k: Tensor, v: Tensor, states: Tensor) -> Projected:
        """What each text and the picture found, [B, N, H D]. q, k, v: [B, H, N, D] of all three; states: of the batch
        that they were made of."""
        self.run.reached = True
        out = self._joint(self._streams(q), self._streams(k), self._streams(v), self.run.chosen(states))
        positive, negative, image = (merged(part).to(states.dtype) for part in out)
        return positive, negative, image

    def _joint(self, q: Streams, k: Streams, v: Streams, rows: Tensor | None) -> Streams:
        """Texts of different numbers of tokens one number at a time."""
        steering, away = self.run.steering, self.run.away
        groups = self.run.by_lengths(len(q.image))
        if groups is None:
            return steering.joint(q, k, v, rows, away.empty)
        found = Streams(*(torch.zeros_like(part) for part in q))
        for at, own, length in groups:
            few = [
                Streams(part.positive[at, :, :own], away.shortened(part.negative[at], length), part.image[at])
                for part in (q, k, v)
            ]
            out = steering.joint(few[0], few[1], few[2], None if rows is None else rows[at], away.empty)
            found.positive[at, :, :own], found.image[at] = out.positive, out.image
            found.negative[at] = away.lengthened(out.negative, length)
        return found

    def projected(self, attn: Any, states: Tensor, added: str) -> Projected:
        """Queries, keys and values [B, H, N, D] of the picture's tokens, or ("added_") of the texts'."""
        fused = isinstance(self.inner, FusedJointAttnProcessor2_0)
        if fused or (isinstance(self.inner, FUSING) and attn.fused_projections):
            parts = (attn.to_added_qkv if added else attn.to_qkv)(states).chunk(3, -1)
        elif added:
            parts = attn.add_q_proj(states), attn.add_k_proj(states), attn.add_v_proj(states)
        else:
            parts = attn.to_q(states), attn.to_k(states), attn.to_v(states)
        q, k, v = (heads(part, attn) for part in parts)
        return normed(q, getattr(attn, f"norm_{added}q")), normed(k, getattr(attn, f"norm_{added}k")), v

    def _streams(self, joined: Tensor) -> Streams:
        before, negative = self.run.positive_tokens, self.run.away.tokens.shape[1]
        return Streams(*joined.split([before, negative, joined.shape[2] - before - negative], 2))
