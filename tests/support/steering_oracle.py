"""Negative steering by its papers' equations, in NumPy, and inputs for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from onestep.core.guidance import Steering, Streams

Array = np.ndarray[Any, np.dtype[np.float64]]
KeysValues = tuple[Array, Array]
EMPTY = 1
"""The empty text's tokens, the last of the negative's, where a mode wants them."""


def attend(q: Array, k: Array, v: Array, bias: Array | float = 0.0) -> Array:
    """softmax(q k^T / sqrt(D) + bias) v, [B, H, N, D]."""
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(q.shape[-1]) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), v)


def norms(z: Array, order: float) -> Array:
    """[B, 1, N, 1]: of each token of [B, H, N, D], over all its heads."""
    return (np.abs(z) ** order).sum((1, 3), keepdims=True) ** (1 / order)


def nag_by_hand(z_pos: Array, z_neg: Array, s: float, tau: float, alpha: float, order: float) -> Array:
    """arXiv:2505.21179: extrapolate by phi = s - 1, limit each token's norm to tau times what it was, blend."""
    pushed = z_pos + (s - 1) * (z_pos - z_neg)
    ratio = norms(pushed, order) / norms(z_pos, order)
    return alpha * pushed * np.minimum(ratio, tau) / ratio + (1 - alpha) * z_pos


def perp_by_hand(z_pos: Array, z_neg: Array, z_empty: Array, steering: Steering) -> Array:
    """As NAG, but from the empty text: the negative is weighed beside the prompt, and loses what it shares with that,
    head by head, ``keep`` times (arXiv:2304.04968: once)."""
    prompt, away = z_pos - z_empty, z_neg - z_empty
    unit = prompt / np.maximum(np.sqrt((prompt**2).sum(-1, keepdims=True)), 1e-300)
    away = away - steering.keep * np.maximum((unit * away).sum(-1, keepdims=True), 0) * unit
    pushed = z_pos + (steering.scale - 1) * (prompt - steering.weight * away)
    ratio = norms(pushed, steering.order) / norms(z_pos, steering.order)
    return steering.alpha * pushed * np.minimum(ratio, steering.tau) / ratio + (1 - steering.alpha) * z_pos


def steer_by_hand(
    steering: Steering, q: Array, seen: KeysValues, unwanted: KeysValues, shared: KeysValues, added: Any = 0.0
) -> Array:
    """What a picture's queries find in the positive's keys, the negative's, and those they see beside either.
    added: what a host adds to the positive's answer."""
    tail = EMPTY if steering.wants_empty else 0
    unwanted, empty = parted(unwanted, tail)
    (k, v), (k_neg, v_neg) = beside(seen, shared), beside(unwanted, shared)
    if steering.mode == "perp":
        z_empty = attend(q, *beside(empty, shared))
        return perp_by_hand(attend(q, k, v) + added, attend(q, k_neg, v_neg), z_empty, steering)
    if steering.mode == "vsf":
        bias = np.repeat([0.0, -steering.offset], [k.shape[2], unwanted[0].shape[2]])
        return attend(q, *beside((k, v), (unwanted[0], -steering.scale * unwanted[1])), bias) + added
    z_pos, z_neg = attend(q, k, v) + added, attend(q, k_neg, v_neg)
    if steering.mode == "nasa":
        return z_pos - steering.scale * z_neg
    return nag_by_hand(z_pos, z_neg, steering.scale, steering.tau, steering.alpha, steering.order)


def parted(parts: Any, tail: int) -> tuple[Any, Any]:
    """The negative's share of each of ``parts``, and that of the empty text, the last ``tail`` tokens."""
    last = parts[0].shape[2] - tail
    return tuple(part[:, :, :last] for part in parts), tuple(part[:, :, last:] for part in parts)


def beside(keys_values: KeysValues, others: KeysValues) -> KeysValues:
    k, v = (np.concatenate(pair, 2) for pair in zip(keys_values, others, strict=True))
    return k, v


def doubled_by_hand(steering: Steering, q: Streams, k: Streams, v: Streams) -> tuple[Array, Array, Array]:
    """A network to a text, side by side, with the same picture: whole sequences attend to themselves."""
    picture = tuple(part[2] for part in (q, k, v))
    away = parted(tuple(part[1] for part in (q, k, v)), EMPTY if steering.wants_empty else 0)
    texts = [tuple(part[0] for part in (q, k, v)), *away]
    found = [attend(*(np.concatenate(pair, 2) for pair in zip(text, picture, strict=True))) for text in texts]
    positive, *others = (out[:, :, : text[0].shape[2]] for out, text in zip(found, texts, strict=True))
    image = steer_by_hand(steering, q[2], (k[0], v[0]), (k[1], v[1]), (k[2], v[2]))
    return positive, np.concatenate(others, 2), image


def drawn(*lengths: int, batch: int = 2, heads: int = 3, width: int = 4, dtype: torch.dtype = torch.float64) -> Any:
    """[batch, heads, length, width] each."""
    return [torch.randn(batch, heads, length, width, dtype=dtype) for length in lengths]


def streams(lengths: tuple[int, int, int] = (5, 4, 7), **shape: Any) -> list[Streams]:
    """Queries, keys and values of two texts of different lengths and a picture. Some queries look sharply."""
    q, k, v = (Streams(*drawn(*lengths, **shape)) for _ in range(3))
    return [Streams(*(3 * part for part in q)), k, v]


def crossed() -> tuple[Tensor, ...]:
    """A picture's queries, keys and values of its text, keys and values of its negative."""
    q, *texts = drawn(7, 5, 5, 4, 4)
    return 3 * q, *texts


def numpied(*tensors: Tensor) -> list[Array]:
    return [tensor.detach().double().numpy() for tensor in tensors]
