"""SD3 and Flux modulate all tokens of the text by one pooled text; here each text's tokens by its own.

By forward hooks that live as long as one forward. Flux asks a layer for what shifts, scales and gates: it may answer
for each token. SD3 can only be told a vector for all tokens: it is told one that changes nothing, and the layers that
it is meant for apply what each token has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from comfy.ldm.flux.layers import ModulationOut
from torch import Tensor

from ..core.errors import OneStepError

Parts = tuple[Tensor, ...]


class Embeddings:
    """[B, C] of time, guidance and each other text's pooled text, as the network's own forward adds them up.

    pooled: [B, P] of each text behind the positive. lengths: tokens of the positive and of each behind it.
    """

    def __init__(self, pooled: list[Tensor], lengths: list[int]) -> None:
        self.pooled, self.lengths = pooled, lengths
        self.time: Tensor | None = None
        self.others: list[Tensor] = []
        self.length = 0

    def of_time(self, module: Any, given: Any, out: Tensor) -> None:
        self.time = out if self.time is None else self.time + out

    def of_pooled(self, module: Any, given: Any, out: Tensor) -> None:
        if self.time is None or len(self.time) != len(self.pooled[0]):
            raise OneStepError(
                "reference pictures at another time (index_timestep_zero) are not served beside Negative Steering by "
                "NASA, NAG or PERP: use VSF, or another method for reference latents"
            )
        told = (pooled[:, : given[0].shape[1]].to(given[0]) for pooled in self.pooled)
        self.others = [self.time + module.forward(pooled) for pooled in told]

    def joined(self, module: Any, out: Any) -> list[Any]:
        """A modulation's answer for the positive's embedding and for the others'."""
        return [out, *(module.forward(other) for other in self.others)]


@contextmanager
def modulated(network: Any, pooled: list[Tensor], lengths: list[int]) -> Iterator[None]:
    """Within, each text's tokens are modulated by its own pooled text; without pooled texts nothing changes."""
    with ExitStack() as hooks:
        if pooled:
            install = _install_flux if hasattr(network, "double_blocks") else _install_sd3
            install(network, Embeddings(pooled, lengths), hooks)
        yield


def hang(hooks: ExitStack, module: Any, hook: Any) -> None:
    """A forward hook until ``hooks`` closes."""
    hooks.callback(module.register_forward_hook(hook).remove)


def _check(states: Tensor, count: int) -> None:
    if states.shape[1] != count:
        raise OneStepError(
            f"the texts have {states.shape[1]} tokens where {count} are expected: another patch adds tokens, which "
            "Negative Steering cannot follow; take one of the two away"
        )


def for_each(vectors: Parts, lengths: list[int]) -> Tensor:
    """[B, C] or [B, 1, C] of each text -> [B, L, C], of each token."""
    each = ((one if one.ndim == 3 else one[:, None]) for one in vectors)
    return torch.cat([one.expand(-1, n, -1) for one, n in zip(each, lengths, strict=True)], 1)


# -- Flux -------------------------------------------------------------------------------------------------------------


def _install_flux(network: Any, embeddings: Embeddings, hooks: ExitStack) -> None:
    for name in ("time_in", "guidance_in"):
        if getattr(network, name, None) is not None:
            hang(hooks, getattr(network, name), embeddings.of_time)
    hang(hooks, network.vector_in, embeddings.of_pooled)

    def of_texts(module: Any, given: Any, out: Any) -> Any:
        return _of_tokens(embeddings.joined(module, out), embeddings.lengths)

    def of_sequence(module: Any, given: Any, out: Any) -> Any:
        picture = embeddings.length - sum(embeddings.lengths)
        return _of_tokens([*embeddings.joined(module, out), out], [*embeddings.lengths, picture])

    def measure(module: Any, given: Any) -> None:
        embeddings.length = given[0].shape[1]

    for block in network.double_blocks:
        hang(hooks, block.txt_mod, of_texts)
        hang(hooks, block.txt_norm1, lambda module, given, out: _check(out, sum(embeddings.lengths)))
    for block in network.single_blocks:
        hooks.callback(block.register_forward_pre_hook(measure).remove)
        hang(hooks, block.modulation, of_sequence)


def _of_tokens(answers: list[Any], lengths: list[int]) -> tuple[Any, ...]:
    """Flux' modulations, one or two for each text, as one or two for each token."""
    return tuple(None if parts[0] is None else _joined(parts, lengths) for parts in zip(*answers, strict=True))


def _joined(parts: Any, lengths: list[int]) -> Any:
    fields = (tuple(getattr(part, name) for part in parts) for name in ("shift", "scale", "gate"))
    return ModulationOut(*(for_each(vectors, lengths) for vectors in fields))


# -- SD3 --------------------------------------------------------------------------------------------------------------


def _install_sd3(network: Any, embeddings: Embeddings, hooks: ExitStack) -> None:
    hang(hooks, network.t_embedder, embeddings.of_time)
    hang(hooks, network.y_embedder, embeddings.of_pooled)
    for block in network.joint_blocks:
        TextBlock(embeddings).install(block.context_block, hooks)


class TextBlock:
    """The text's part of one of SD3's blocks. told: [B, L, C] each, what shifts, scales and gates its tokens."""

    def __init__(self, embeddings: Embeddings) -> None:
        self.embeddings = embeddings
        self.told: Parts = ()

    def install(self, block: Any, hooks: ExitStack) -> None:
        hang(hooks, block.adaLN_modulation, self.modulation)
        hang(hooks, block.norm1, lambda module, given, out: self.shifted(out, 0))
        if not block.pre_only:
            hang(hooks, block.attn.proj, lambda module, given, out: self.told[2] * out)
            hang(hooks, block.norm2, lambda module, given, out: self.shifted(out, 3))
            hang(hooks, block.mlp, lambda module, given, out: self.told[5] * out)

    def shifted(self, out: Tensor, first: int) -> Tensor:
        shift, scale = self.told[first : first + 2]
        _check(out, shift.shape[1])
        return torch.addcmul(shift, out, 1 + scale)

    def modulation(self, module: Any, given: Any, out: Tensor) -> Tensor:
        """[B, 2 C or 6 C]: shift and scale, and where the block goes on, gate, shift, scale and gate again."""
        whole = for_each(tuple(self.embeddings.joined(module, out)), self.embeddings.lengths)
        self.told = whole.split(given[0].shape[1], 2)
        nothing = torch.zeros_like(out).unflatten(1, (len(self.told), -1))
        nothing[:, 2::3] = 1  # gates
        return nothing.flatten(1)
