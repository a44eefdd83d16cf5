"""Z-Image and Lumina 2, steered: [prompt, negative, picture] in one sequence, each text refined and placed as if alone.

By forward hooks that live as long as one forward: learnt tokens where Z-Image fills each text up, positions of each
right before the picture, and which attentions are the texts' refiner's. The attention override keeps the texts apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import OneStepError
from ..core.one_stream import Texts
from .steer_attention import OVERRIDE, Attend, JointAttention, followed
from .steer_modulation import hang

REFERENCES = (
    "Negative Steering does not serve this model with reference pictures: take ReferenceLatent away, or sample without "
    "steering"
)


@dataclass
class StreamAttention:
    """The attention override. joint: of [texts, picture]. refining: whether a block of the texts' refiner runs."""

    joint: JointAttention
    filled: tuple[int, ...]
    refining: bool = False

    def __call__(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, heads: int, *mask: Any, **rest: Any) -> Tensor:
        if not self.refining:
            return self.joint(attend, q, k, v, heads, *mask, **rest)
        tokens = 2 if rest.get("skip_reshape") else 1
        if k.shape[tokens] != sum(self.filled):
            raise OneStepError(REFERENCES)
        texts = zip(*(part.split(self.filled, tokens) for part in (q, k, v)), strict=True)
        look = followed(self.joint.earlier, attend)
        found = [look(*text, heads, *mask, **rest) for text in texts]
        return torch.cat(found, 2 if rest.get("skip_output_reshape") else 1)


def stream_texts(call: Any) -> Texts:
    """Of a `steer_networks.Call`."""
    return Texts(tuple(text.shape[1] for text in call.texts()), call.network.pad_tokens_multiple or 1)


def steer_stream(call: Any, options: dict[str, Any]) -> Tensor:
    texts, patch = stream_texts(call), call.network.patch_size
    height, width = (-(-side // patch) for side in call.x.shape[-2:])
    image = -(-height * width // texts.multiple) * texts.multiple
    prompt, negative, *empty = texts.filled
    joint = JointAttention(
        *(call.steering, (prompt, negative + sum(empty)), sum(empty), image, call.rows, call.reached),
        *(options.get(OVERRIDE), negative - texts.own[1]),
    )
    options[OVERRIDE] = StreamAttention(joint, texts.filled)
    return texts.joined(call.texts())


def within_stream(call: Any, options: dict[str, Any]) -> AbstractContextManager[None]:
    return one_stream(call.network, stream_texts(call), options[OVERRIDE])


@contextmanager
def one_stream(network: Any, texts: Texts, attention: StreamAttention) -> Iterator[None]:
    """Within, ``network`` reads ``texts`` as if each were the only one."""
    places = Places(texts)

    def fill(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        return torch.where(texts.filling.to(out.device)[:, None], network.cap_pad_token.to(out), out)

    def refining(begins: bool) -> Any:
        def mark(*_: Any) -> None:
            attention.refining = begins

        return mark

    with ExitStack() as hooks:
        if network.pad_tokens_multiple:
            hang(hooks, network.cap_embedder, fill)
        hooks.callback(network.rope_embedder.register_forward_pre_hook(places).remove)
        for block in network.context_refiner:
            hooks.callback(block.register_forward_pre_hook(refining(True)).remove)
            hang(hooks, block, refining(False))
        yield


class Places:
    """A hook before the network's rotary embedding, which is asked for the texts' tokens, then for the picture's."""

    def __init__(self, texts: Texts) -> None:
        self.texts, self.asked = texts, 0

    def __call__(self, module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        """ids [1, N, 3]: time, row and column; 0, 0, 0 of a token that fills the picture up."""
        ids, self.asked = given[0].clone(), self.asked + 1
        time = self.texts.times.to(ids) if self.asked == 1 else torch.where(ids[..., 0] == 0, 0.0, self.texts.picture)
        if self.asked > 2 or time.shape[-1] != ids.shape[1]:
            raise OneStepError(REFERENCES)
        ids[..., 0] = time
        return (ids,)
