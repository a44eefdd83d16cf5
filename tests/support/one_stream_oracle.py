"""The doubled form of Z-Image in diffusers: rows are the prompts', then each other text's, with the same picture, whose
rows are overwritten in all after each attention; positions and attention in NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from small_networks import run_z_image
from steered_networks import Array, array, attend, flipped, joined, mixed
from torch import Tensor

FILLED = 32


def filled(length: int) -> int:
    return -(-length // FILLED) * FILLED


class Formula:
    """exp(i p theta^(-2 j / d)) for each axis of d numbers and its place p, which may be below 0."""

    def __init__(self, axes: Sequence[int], theta: float) -> None:
        self.axes, self.theta = axes, theta

    def __call__(self, ids: Tensor) -> Tensor:
        angles = [
            ids[:, axis : axis + 1].double() * self.theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
            for axis, width in enumerate(self.axes)
        ]
        every = torch.cat(angles, 1).float()
        return torch.polar(torch.ones_like(every), every)


@contextmanager
def placed_by_the_prompt(network: Any, prompts: list[int]) -> Iterator[None]:
    """Within, each row's picture is where its prompt alone would put it, and every text ends right before that."""
    usual, rope, calls = network._pad_with_ids, network.rope_embedder, count()

    def at(feat: Tensor, grid: Any, start: Any, *rest: Any, **more: Any) -> Any:
        """Of a row's text, then of its picture."""
        row, is_picture = divmod(next(calls), 2)
        end = filled(prompts[row % len(prompts)]) + 1
        return usual(feat, grid, (end if is_picture else end - filled(len(feat)), 0, 0), *rest, **more)

    network._pad_with_ids, network.rope_embedder = at, Formula(network.axes_dims, network.rope_theta)
    try:
        yield
    finally:
        del network._pad_with_ids
        network.rope_embedder = rope


class StreamOracle:
    """A joint attention of [picture, text] in rows. own: real tokens of each text, by row. picture: its tokens.
    prompts: how many of the rows, the first, are theirs."""

    def __init__(self, mode: str, prompts: int, own: list[int], picture: int) -> None:
        self.mode, self.prompts, self.own, self.picture = mode, prompts, own, picture

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Any = None,
    ) -> Tensor:
        found = [torch.from_numpy(joined(layer(hidden_states), attn.heads)) for layer in (attn.to_q, attn.to_k)]
        turns = freqs_cis.numpy()[:, None]
        q, k = (turned(array(norm(x)), turns) for x, norm in zip(found, (attn.norm_q, attn.norm_k), strict=True))
        v = joined(attn.to_v(hidden_states), attn.heads)
        seen = np.ones((len(q), q.shape[2]), dtype=bool) if attention_mask is None else attention_mask.numpy()
        out = attend(q, k, v, np.where(seen, 0.0, -np.inf)[:, None, None])
        for row in range(self.prompts):
            self._push(out, row, q, k, v, seen)
        merged = torch.from_numpy(out.transpose(0, 2, 1, 3).reshape(hidden_states.shape))
        return attn.to_out[0](merged.to(hidden_states.dtype))

    def _push(self, out: Array, row: int, q: Array, k: Array, v: Array, seen: Array) -> None:
        rows, image = range(row, len(out), self.prompts), slice(0, self.picture)
        if self.mode == "vsf":
            other = slice(self.picture, self.picture + self.own[rows[1]])
            keys, values = ((x[[row]][:, :, seen[row]], x[[rows[1]]][:, :, other]) for x in (k, v))
            picture = flipped(q[[row]][:, :, image], keys, values)
        else:
            picture = mixed(self.mode, *(out[[each]][:, :, image] for each in rows))
        for each in rows:
            out[each, :, image] = picture[0]


def turned(x: Array, turns: Array) -> Array:
    """[B, H, N, D], neighbours as one complex number, times [B, 1, N, D / 2]."""
    pairs = (x[..., ::2] + 1j * x[..., 1::2]) * turns
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


@torch.no_grad()
def doubled_stream(
    network: Any,
    mode: str,
    inputs: dict[str, Any],
    others: list[list[Tensor]],
    placed: bool = True,
    residual: Tensor | None = None,
) -> Tensor:
    """The prediction for ``inputs``, whose text may be a list. others: of each other text, [L, C] for each row.
    residual: what a ControlNet adds behind the first block to picture and prompt, [B, N, C], whose texts are all of one
    length when filled up.

    placed: False is each row as the network itself places it, which is the same where nothing fills the picture up.
    """
    x, prompts = inputs["x"], list(inputs["text"])
    texts = [*prompts, *(text for each in others for text in each)]
    rows = {name: torch.cat([inputs[name]] * (1 + len(others))) for name in ("x", "time")}
    oracle = StreamOracle(mode, len(x), list(map(len, texts)), filled(x.shape[-2] * x.shape[-1] // 4))
    with ExitStack() as undo:
        for layer in network.layers:
            undo.callback(layer.attention.set_processor, layer.attention.processor)
            layer.attention.set_processor(oracle)
        if placed:
            undo.enter_context(placed_by_the_prompt(network, list(map(len, prompts))))
        call = network
        if residual is not None:
            of_picture = residual * (torch.arange(residual.shape[1]) < oracle.picture)[:, None]
            added = torch.cat([residual, *[of_picture] * len(others)])
            call = partial(network, controlnet_block_samples={0: added})
        answer = run_z_image(call, {**rows, "text": texts})
    one, *same = answer.chunk(1 + len(others))
    for other in same if placed else []:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(one.abs().max()))
    return one
