"""Networks of one stream, steered; Z-Image: [picture, prompt, negative], each text filled up, refined and placed as if
alone.

The network reads both texts as one. Learnt tokens go where each is filled up, positions are those of each text right
before the picture, and every attention keeps the texts apart.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.families import FAMILIES
from ..core.guidance import Streams
from ..core.one_stream import Texts
from ..kernels import attention
from .heads import heads, merged, normed
from .steer_joint import Given
from .steer_run import Run
from .threads import only_here

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Alike:
    """Rows of a forward that are equally long. rows: which; a slice is all. picture: its tokens, filled up. behind:
    whether it follows the texts."""

    rows: Any
    picture: int
    texts: Texts
    behind: bool = False

    def split(self, states: Tensor, picture: bool) -> list[Tensor]:
        """[B, H, N, D] -> these rows of the picture, if it is there, and of each text, without the batch's padding."""
        sizes = [self.picture] if picture else []
        sizes = [*self.texts.filled, *sizes] if self.behind else [*sizes, *self.texts.filled]
        parts = list(states[self.rows, :, : sum(sizes)].split(sizes, 2))
        return [parts[-1], *parts[:-1]] if picture and self.behind else parts

    def joined(self, parts: list[Tensor]) -> Tensor:
        """The picture and what the texts are, again in the sequence's order."""
        return torch.cat([*parts[1:], parts[0]] if self.behind else parts, 2)


@dataclass
class OneStream:
    """The texts of a steered forward. multiple: of how many tokens the network makes each text and the picture."""

    run: Run
    network: Any
    multiple: int
    alike: list[Alike] = field(default_factory=list)
    filling: Tensor | None = None
    times: list[Tensor] = field(default_factory=list)
    time = "t"

    def counted(self, time: float) -> float:
        """1000 sigma of the 1 - sigma that the network is given."""
        return float(FAMILIES["z_image"].time_of(time))

    def latents_and_prompts(self, given: Given) -> tuple[Any, Any]:
        return given["x"], given["cap_feats"]

    def joined(self, given: Given) -> Given:
        pictures, prompts = given["x"], given["cap_feats"]
        rows = beside(self.run, prompts)
        texts = [Texts(tuple(map(len, row)), self.multiple) for row in rows]
        sizes = [self._picture(picture, given) for picture in pictures]
        self.alike = grouped(sizes, texts)
        self.filling = torch.cat([each.filling for each in texts]).to(prompts[0].device)
        of_pictures = [torch.full((size,), each.picture) for size, each in zip(sizes, texts, strict=True)]
        self.times = [torch.cat(of_pictures), torch.cat([each.times for each in texts])]
        changed: Given = {"cap_feats": [each.joined(row) for each, row in zip(texts, rows, strict=True)]}
        if given.get("controlnet_block_samples") is not None:
            ends = [size + each.filled[0] for size, each in zip(sizes, texts, strict=True)]
            longest = max(size + sum(each.filled) for size, each in zip(sizes, texts, strict=True))
            added = given["controlnet_block_samples"].items()
            changed["controlnet_block_samples"] = {at: _lengthened(one, ends, longest) for at, one in added}
        return changed

    def clear(self) -> None:
        self.alike, self.filling, self.times = [], None, []

    def install(self, undo: ExitStack) -> None:
        """Learnt tokens and positions until ``undo`` closes."""
        layer, places = self.network.cap_embedder, self.network.rope_embedder
        undo.callback(layer.register_forward_hook(only_here(self._fill)).remove)
        undo.callback(setattr, self.network, "rope_embedder", places)
        self.network.rope_embedder = Places(places, self)

    def _picture(self, picture: Tensor, given: Given) -> int:
        """Tokens of a picture [C, F, h, w], filled up."""
        _, frames, height, width = picture.shape
        side, depth = given.get("patch_size", 2), given.get("f_patch_size", 1)
        own = (frames // depth) * (height // side) * (width // side)
        return -(-own // self.multiple) * self.multiple

    def _fill(self, layer: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        """A forward hook of what embeds the texts [T, C] of all rows."""
        if self.filling is None:
            return None
        return torch.where(self.filling[:, None], self.network.cap_pad_token.to(out), out)


class Places:
    """The network's rotary embedding, which is asked for the pictures' tokens, then for the texts'."""

    def __init__(self, inner: Any, texts: OneStream) -> None:
        self.inner, self.texts = inner, texts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, ids: Tensor) -> Tensor:
        """[N, D / 2] complex, of ids [N, 3]: time, row and column; 0, 0, 0 of a token that fills a picture up."""
        if not (self.texts.run.acting and self.texts.times):
            return self.inner(ids)  # type: ignore[no-any-return]
        time = ids[:, 0]
        time = torch.where(time == 0, time, self.texts.times.pop(0).to(time))
        angles = self.inner(torch.cat([time[:, None].abs(), ids[:, 1:]], 1))
        # times below 0 turn the other way; a text's rows and columns are 0, which turn nothing
        return torch.where(time[:, None] < 0, angles.conj(), angles)


def beside(run: Run, prompts: list[Tensor]) -> list[Parts]:
    """Of each row the prompt [L, C], the negative, and the empty text where there is one."""
    away, like = run.away, prompts[0]
    tokens = away.tokens.to(like.device, like.dtype)
    end = tokens.shape[1] - away.empty
    lengths, batch, count = away.lengths or (end,) * len(away), len(prompts), run.count(len(prompts))
    places = [at * len(away) // count for at in range(count)] * (batch // count)
    zeros = [(tokens[row, end:],) if away.empty else () for row in places]
    return [(prompts[at], tokens[row, : lengths[row]], *zeros[at]) for at, row in enumerate(places)]


def _lengthened(added: Tensor, ends: list[int], longest: int) -> Tensor:
    """What a ControlNet adds behind a block [B, N, C], for picture and prompt up to ``ends`` alone, as
    [B, longest, C]."""
    found = added.new_zeros(len(added), longest, added.shape[2])
    for row, end in enumerate(ends):
        found[row, :end] = added[row, :end]
    return found


def grouped(pictures: list[int], texts: list[Texts], behind: bool = False) -> list[Alike]:
    """The rows of a batch that are equally long. behind: as in `Alike`."""
    rows: dict[tuple[int, Texts], list[int]] = {}
    for row, key in enumerate(zip(pictures, texts, strict=True)):
        rows.setdefault(key, []).append(row)
    if len(rows) == 1:
        return [Alike(slice(None), pictures[0], texts[0], behind)]
    return [Alike(torch.tensor(numbers), *key, behind) for key, numbers in rows.items()]


class StreamAttention:
    """Steers the queries, keys and values of one attention of picture and texts, or, where it has no picture, keeps the
    texts apart."""

    def __init__(self, texts: Any, picture: bool) -> None:
        self.texts, self.picture = texts, picture

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, states: Tensor) -> Tensor:
        """[B, N, H D], zeros where nothing is; q, k, v: [B, H, N, D]. states: of the batch that they were made of."""
        run = self.texts.run
        run.reached = run.reached or self.picture
        out, flags = torch.zeros_like(v), run.chosen(states)
        for alike in self.texts.alike:
            parts = [alike.split(part, self.picture) for part in (q, k, v)]
            found = alike.joined(self._steered(alike, parts, flags)) if self.picture else torch.cat(apart(parts), 2)
            out[alike.rows, :, : found.shape[2]] = found
        return merged(out).to(states.dtype)

    def _steered(self, alike: Alike, parts: list[list[Tensor]], flags: Tensor | None) -> list[Tensor]:
        """Of the picture and of the texts. parts: of queries, keys and values."""
        own, run = alike.texts.own, self.texts.run
        q, k, v = (Streams(text, torch.cat(others, 2), image) for image, text, *others in parts)
        empty = alike.texts.filled[2] if len(own) > 2 else 0
        filling = alike.texts.filled[1] - own[1]
        chosen = None if flags is None else flags[alike.rows]
        out = run.steering.joint(q, k, v, chosen, empty, filling)
        return [out.image, out.positive, out.negative]


class StreamSteered:
    """Steers one attention of Z-Image's."""

    def __init__(self, inner: Any, texts: OneStream, picture: bool) -> None:
        self.inner, self.texts, self.attended = inner, texts, StreamAttention(texts, picture)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Any = None,
    ) -> Tensor:
        if not self.texts.run.acting:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)  # type: ignore[no-any-return]
        q, k, v = (heads(layer(hidden_states), attn) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q, k = (_turned(normed(part, norm), freqs_cis) for part, norm in ((q, attn.norm_q), (k, attn.norm_k)))
        steered = self.attended(q, k, v, hidden_states)
        for layer in attn.to_out:
            steered = layer(steered)
        return steered


def apart(parts: list[list[Tensor]]) -> list[Tensor]:
    """Each text by itself."""
    return [attention(*text) for text in zip(*parts, strict=True)]


def _turned(states: Tensor, angles: Tensor) -> Tensor:
    """[B, H, N, D] by angles [B, N, D / 2], complex: neighbours are one complex number, as diffusers has it."""
    pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angles[:, None]).flatten(-2).type_as(states)
