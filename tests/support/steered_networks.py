"""What negative steering must compute, in NumPy on diffusers' own networks: processors that know no Steering.

U-Nets: each cross-attention by its formula. SD3, Flux and FLUX.2: the doubled form, a batch of positive and negative
text (and the empty one, where the mode wants it) with the same picture, whose rows are overwritten in all after each
attention.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from modulated_networks import picture_under_the_prompt
from numpy.typing import NDArray
from small_networks import CASES, inputs_of, network_of, seeded
from tiny_pipelines import make
from torch import Tensor

from onestep.core.cond import Cond
from onestep.core.guidance import Steering
from onestep.pipelines import steered

Array = NDArray[np.float64]
PIPES = {"sd15": "sd", "sdxl": "sdxl", "sd3": "sd3", "sd35": "sd3", "flux": "flux", "z_image": "z_image"}
PIPES |= {"flux2": "klein", "qwen_image": "qwen_image", "chroma": "chroma", "lumina2": "lumina2", "krea2": "krea2"}
UNETS, POOLED = ("sd15", "sdxl"), ("sd3", "sd35", "flux")
JOINT = (*POOLED, "flux2", "qwen_image", "chroma", "krea2")
SCALES = {"nasa": 0.3, "nag": 5.0, "vsf": 1.5, "perp": 5.0}
WEIGHT, KEEP = Steering.weight, Steering.keep
TAU, ALPHA, OFFSET = 2.5, 0.25, 0.1
STEERINGS = {mode: Steering(mode, scale, TAU, ALPHA, 1, OFFSET) for mode, scale in SCALES.items()}


def pipe_of(name: str, dtype: torch.dtype = torch.float64) -> tuple[DiffusionPipeline, Any]:
    """A pipeline around the seeded network of a name in small_networks.CASES, and that network."""
    pipe, network = make(PIPES[name]), network_of(name, dtype)
    setattr(pipe, "unet" if name in UNETS else "transformer", network)
    return pipe, network


def texts(count: int, length: int, seed: int = 7) -> Tensor:
    return seeded(seed)(count, length, 24)


def empty() -> Tensor:
    """What stands for the empty text."""
    return texts(1, 6, seed=8)


def empty_with_pooled() -> Cond:
    return Cond(empty(), pooled=pooled(1, seed=10))


def pooled(count: int, seed: int = 9) -> Tensor:
    return seeded(seed)(count, 16)


def away(pipe: Any, negative: Tensor | Cond, steering: str | Steering, **more: Any) -> Any:
    """`steered` by the oracles' numbers where a mode is given by name; it has the empty text too."""
    chosen = STEERINGS[steering] if isinstance(steering, str) else steering
    zero = empty_with_pooled() if isinstance(negative, Cond) else empty()
    return steered(pipe, negative, chosen, empty=zero, **more)


def run(name: str, network: Any, inputs: dict[str, Tensor] | None = None, **more: Any) -> Tensor:
    """The network's prediction; ``more`` are arguments of its forward."""
    dtype = next(network.parameters()).dtype
    with torch.no_grad():
        return CASES[name].run(lambda *a, **k: network(*a, **k, **more), inputs or inputs_of(name, dtype))


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def joined(states: Tensor, heads: int) -> Array:
    """[B, N, H D] -> [B, H, N, D]"""
    b, n, c = states.shape
    return array(states).reshape(b, n, heads, c // heads).transpose(0, 2, 1, 3)


def attend(q: Array, k: Array, v: Array, bias: Array | float = 0.0) -> Array:
    scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5 + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def mixed(mode: str, positive: Array, negative: Array, empty: Array | None = None) -> Array:
    """NASA: Z+ - a Z-. NAG: s Z+ - (s - 1) Z-, its norm at most tau times Z+'s, blended; L1 over heads and width. Perp:
    Z+ + (s - 1) (a - n b') in its place, a and b from the empty text, b' less ``KEEP`` times its part along a."""
    s = SCALES[mode]
    if mode == "nasa":
        return positive - s * negative
    guided = s * positive - (s - 1) * negative
    if empty is not None:
        a, b = positive - empty, negative - empty
        b = b - KEEP * np.maximum((a * b).sum(-1, keepdims=True), 0) / (a * a).sum(-1, keepdims=True) * a
        guided = positive + (s - 1) * (a - WEIGHT * b)
    ratio = np.abs(guided).sum((1, 3), keepdims=True) / np.abs(positive).sum((1, 3), keepdims=True)
    return ALPHA * guided * np.minimum(ratio, TAU) / ratio + (1 - ALPHA) * positive


def flipped(q: Array, keys: tuple[Array, Array], values: tuple[Array, Array]) -> Array:
    """VSF: one softmax over both; the second text's scores lose the offset, its values are multiplied by -s."""
    bias = np.concatenate([np.zeros(keys[0].shape[2]), np.full(keys[1].shape[2], -OFFSET)])
    return attend(q, np.concatenate(keys, 2), np.concatenate([values[0], -SCALES["vsf"] * values[1]], 2), bias)


class CrossOracle:
    """A U-Net's cross-attention. extra: (keys, values, scale) layers' part of an IP-Adapter, if there is one."""

    def __init__(self, mode: str, negative: Tensor, image_prompt: Any = None) -> None:
        self.mode, self.negative, self.image_prompt = mode, negative, image_prompt

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None
    ) -> Tensor:
        text, pictures = encoder_hidden_states, None
        if isinstance(text, tuple):
            text, pictures = text
        q = joined(attn.to_q(hidden_states), attn.heads)
        others = (self.negative, empty()) if self.mode == "perp" else (self.negative,)
        repeated = [other.repeat_interleave(len(text) // len(other), 0).to(text) for other in others]
        (k, v), *rest = ([joined(to(t), attn.heads) for to in (attn.to_k, attn.to_v)] for t in (text, *repeated))
        added = np.zeros_like(q)
        if pictures is not None:
            inner, states = self.image_prompt, pictures[0].flatten(1, -2)
            k_ip, v_ip = (joined(layer[0](states), attn.heads) for layer in (inner.to_k_ip, inner.to_v_ip))
            added = inner.scale[0] * attend(q, k_ip, v_ip)
        if self.mode == "vsf":
            out = flipped(q, (k, rest[0][0]), (v, rest[0][1])) + added
        else:
            out = mixed(self.mode, attend(q, k, v) + added, *(attend(q, *other) for other in rest))
        merged = torch.from_numpy(out.transpose(0, 2, 1, 3).reshape(hidden_states.shape[0], -1, attn.inner_dim))
        return attn.to_out[0](merged.to(hidden_states.dtype))


class JointOracle:
    """The doubled form: rows are the positive texts' pictures, then the negatives'. lengths: tokens of each text. last:
    whether a shorter negative lies at the end of its row, else at the beginning."""

    def __init__(self, mode: str, lengths: list[int], last: bool = False) -> None:
        self.mode, self.lengths = mode, lengths
        self.own = [
            slice(last * (max(lengths) - length), last * (max(lengths) - length) + length) for length in lengths
        ]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        q, k, v = self._project(attn, hidden_states, ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k))
        if encoder_hidden_states is not None:
            layers = ("add_q_proj", "add_k_proj", "add_v_proj")
            text = self._project(attn, encoder_hidden_states, layers, (attn.norm_added_q, attn.norm_added_k))
            q, k, v = (np.concatenate(pair, 2) for pair in zip(text, (q, k, v), strict=True))
        if image_rotary_emb is not None:
            q, k = rotated(q, image_rotary_emb), rotated(k, image_rotary_emb)
        out = self._attended(q, k, v)
        merged = torch.from_numpy(out.transpose(0, 2, 1, 3).reshape(out.shape[0], out.shape[2], -1))
        merged = merged.to(hidden_states.dtype)
        if encoder_hidden_states is None:
            return merged
        texts_out, image = merged[:, : max(self.lengths)], merged[:, max(self.lengths) :]
        last = getattr(attn, "context_pre_only", False)
        return attn.to_out[0](image), texts_out if last else attn.to_add_out(texts_out)

    def _project(self, attn: Any, states: Tensor, layers: tuple[str, ...], norms: Any) -> list[Array]:
        found = [torch.from_numpy(joined(getattr(attn, layer)(states), attn.heads)) for layer in layers]
        normed = [part if norm is None else norm(part) for part, norm in zip(found, (*norms, None), strict=True)]
        return [array(part) for part in normed]

    def hidden(self, rows: int, tokens: int) -> Array:
        """Where texts differ in length the shorter one is padded, and nobody looks at the padding."""
        each, added = rows // len(self.lengths), np.zeros((rows, 1, 1, tokens))
        added[..., : max(self.lengths)] = -np.inf
        for number, own in enumerate(self.own):
            added[number * each : (number + 1) * each, :, :, own] = 0
        return added

    def _attended(self, q: Array, k: Array, v: Array) -> Array:
        each, length = len(q) // len(self.lengths), max(self.lengths)
        out = attend(q, k, v, self.hidden(len(q), k.shape[2]))
        if self.mode == "vsf":
            keys, values = (
                (
                    np.concatenate([x[:each, :, self.own[0]], x[:each, :, length:]], 2),
                    x[each:, :, self.own[1]],
                )
                for x in (k, v)
            )
            picture = flipped(q[:each, :, length:], keys, values)
        else:
            picture = mixed(self.mode, *np.split(out[:, :, length:], len(self.lengths)))
        out[:, :, length:] = np.concatenate([picture] * len(self.lengths))
        return out


class ParallelOracle:
    """FLUX.2's single blocks: W [attention, silu(g) u], (q, k, v, g, u) = V n."""

    def __init__(self, oracle: JointOracle) -> None:
        self.oracle = oracle

    def __call__(
        self, attn: Any, hidden_states: Tensor, attention_mask: Any = None, image_rotary_emb: Any = None
    ) -> Tensor:
        found = array(attn.to_qkv_mlp_proj(hidden_states))
        width, mlp = attn.inner_dim, attn.mlp_hidden_dim
        q, k, v, g, u = np.split(found, [width, 2 * width, 3 * width, 3 * width + mlp], 2)
        q, k, v = (joined(torch.from_numpy(part), attn.heads) for part in (q, k, v))
        q, k = array(attn.norm_q(torch.from_numpy(q))), array(attn.norm_k(torch.from_numpy(k)))
        out = self.oracle._attended(rotated(q, image_rotary_emb), rotated(k, image_rotary_emb), v)
        out = out.transpose(0, 2, 1, 3).reshape(*found.shape[:2], width)
        return attn.to_out(torch.from_numpy(np.concatenate([out, g / (1 + np.exp(-g)) * u], 2)).to(hidden_states))


class QwenOracle:
    """Qwen-Image's, whose two streams are turned apart, by e^(i angle)."""

    def __init__(self, oracle: JointOracle) -> None:
        self.oracle = oracle

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        *more: Any,
        image_rotary_emb: Any,
        **rest: Any,
    ) -> Any:
        project, length = self.oracle._project, encoder_hidden_states.shape[1]
        picture = project(attn, hidden_states, ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k))
        layers = ("add_q_proj", "add_k_proj", "add_v_proj")
        text = project(attn, encoder_hidden_states, layers, (attn.norm_added_q, attn.norm_added_k))
        for stream, angles in ((picture, image_rotary_emb[0]), (text, image_rotary_emb[1])):
            stream[:2] = [turned(part, angles.to(torch.complex128).numpy()) for part in stream[:2]]
        out = self.oracle._attended(*(np.concatenate(pair, 2) for pair in zip(text, picture, strict=True)))
        merged = torch.from_numpy(out.transpose(0, 2, 1, 3).reshape(out.shape[0], out.shape[2], -1)).to(hidden_states)
        return attn.to_out[0](merged[:, length:]), attn.to_add_out(merged[:, :length])


class KreaOracle:
    """Krea 2's, of few heads of keys and values, whose answer each token gates; a text is refined without turns."""

    def __init__(self, oracle: JointOracle) -> None:
        self.oracle = oracle

    def __call__(
        self, attn: Any, hidden_states: Tensor, attention_mask: Any = None, image_rotary_emb: Any = None
    ) -> Tensor:
        heads, few = attn.num_heads, attn.num_kv_heads
        q, k, v = (
            joined(layer(hidden_states), count)
            for layer, count in ((attn.to_q, heads), (attn.to_k, few), (attn.to_v, few))
        )
        q, k = array(attn.norm_q(torch.from_numpy(q))), array(attn.norm_k(torch.from_numpy(k)))
        k, v = np.repeat(k, heads // few, 1), np.repeat(v, heads // few, 1)
        if image_rotary_emb is None:
            out = attend(q, k, v, self.oracle.hidden(len(q), k.shape[2]))
        else:
            out = self.oracle._attended(rotated(q, image_rotary_emb), rotated(k, image_rotary_emb), v)
        merged = out.transpose(0, 2, 1, 3).reshape(hidden_states.shape)
        gate = array(attn.to_gate(hidden_states))
        return attn.to_out[0](torch.from_numpy(merged / (1 + np.exp(-gate))).to(hidden_states))


def turned(x: Array, angles: NDArray[np.complex128]) -> Array:
    """Pairs of neighbours as complex numbers, by unit numbers [N, D / 2]."""
    z = (x[..., ::2] + 1j * x[..., 1::2]) * angles
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def rotated(x: Array, angles: tuple[Tensor, Tensor]) -> Array:
    """Pairs (a, b) of neighbours turned by their angle: (a cos - b sin, b cos + a sin)."""
    cos, sin = (array(part)[:, ::2] for part in angles)
    a, b = x[..., ::2], x[..., 1::2]
    return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)


def doubled(
    name: str,
    network: Any,
    mode: str,
    negative: Tensor | Cond,
    inputs: dict[str, Tensor] | None = None,
    last: bool = False,
    **more: Tensor | list[Tensor],
) -> Tensor:
    """The doubled form's prediction for ``inputs``, by default those of ``name``, each text under its own pooled text
    where the negative has one; ``more`` are residuals of a ControlNet. last: as in JointOracle."""
    inputs = inputs_of(name, next(network.parameters()).dtype) if inputs is None else inputs
    negative = negative if isinstance(negative, Cond) else Cond(negative)
    zero = empty_with_pooled().to(negative.text)
    count, others = len(inputs["text"]), (negative, zero) if mode == "perp" else (negative,)
    every = [inputs["text"], *(other.text.expand(count, -1, -1) for other in others)]
    lengths = [text.shape[1] for text in every]
    missing = [max(lengths) - length for length in lengths]
    sides = [(0, 0, count, 0) if last else (0, 0, 0, count) for count in missing]
    padded = [torch.nn.functional.pad(text, side, value=3.0) for text, side in zip(every, sides, strict=True)]
    rows = {key: torch.cat([value] * len(every)) for key, value in inputs.items()} | {"text": torch.cat(padded)}
    if negative.pooled is not None:
        rows["pooled"] = torch.cat([inputs["pooled"], *(other.pooled.expand(count, -1) for other in others)])
    more = {key: [torch.cat([part] * len(every)) for part in parts] for key, parts in more.items()}
    oracle = JointOracle(mode, lengths, last)
    layerwise = {id(module) for path, module in network.named_modules() if "layerwise_blocks." in path}

    def choose(attn: Any) -> Any:
        if hasattr(attn, "to_qkv_mlp_proj"):
            return ParallelOracle(oracle)
        if hasattr(attn, "to_gate"):
            return None if id(attn) in layerwise else KreaOracle(oracle)
        if name == "qwen_image":
            return QwenOracle(oracle)
        return None if attn.added_kv_proj_dim is None and name not in ("flux", "chroma") else oracle

    during = replaced(network, choose)
    with picture_under_the_prompt(network, len(every)) if name in POOLED else nullcontext():
        answer = during(lambda: run(name, network, rows, **more))
    one, *same = answer.chunk(len(every))
    for other in same:  # the picture's stream is one and the same
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9 * float(one.abs().max()))
    return one


def replaced(network: Any, choose: Callable[[Any], Any]) -> Callable[[Callable[[], Tensor]], Tensor]:
    """call() with the processor that ``choose`` gives an attention, where it gives one."""

    def during(call: Callable[[], Tensor]) -> Tensor:
        before = dict(network.attn_processors)
        chosen = {name: choose(network.get_submodule(name.removesuffix(".processor"))) for name in before}
        network.set_attn_processor({name: chosen[name] or before[name] for name in before})
        try:
            return call()
        finally:
            network.set_attn_processor(dict(before))

    return during
