r"""A rotation of weights (LoRaD, WaDi, CVPR 2026): each pair of neighbouring inputs' weights turns by its own angle.

    W' = [W_odd cos theta - W_even sin theta,  W_odd sin theta + W_even cos theta],   theta = A B
    A [out, r] from 0, B [r, in / 2]

A pair's norm stays, and so does every row's. The turned weights differ from W by no low rank: what a LoRA holds of the
difference is reckoned where one is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter_module import Call
from .extraction import Kept, in_all, kept, low_rank
from .factors import State
from .randomness import generator
from .stored import is_plain, stored_as
from .targets import Target


class _Layers(dict[str, Target]):
    """The host's layers, which a copy of the adapter shares."""

    def __deepcopy__(self, memo: Any) -> _Layers:
        return self


@dataclass(frozen=True)
class Unserved:
    """A layer that cannot be turned, and why."""

    name: str
    why: str


def turnable(targets: Iterable[Target]) -> tuple[list[Target], list[Unserved]]:
    """The linear layers of ``targets`` that can be turned, and those that cannot. A convolution is not turned, nor a
    layer with an odd number of inputs."""
    found, not_served = [], []
    for target in targets:
        if target.is_conv or target.in_features % 2:
            continue
        why = _unserved(target)
        if why:
            not_served.append(Unserved(target.name, why))
        else:
            found.append(target)
    return found, not_served


def _unserved(target: Target) -> str:
    weight: Any = getattr(target.module, "weight", None)
    if target.rows is not None or target.permutation is not None:
        return "is fused with others in this host"
    if not is_plain(weight) or weight.shape != (target.out_rows, target.in_features):
        return f"is stored as {stored_as(target.module) or type(weight).__name__}"
    return ""


def change(weight: Tensor, theta: Tensor) -> Tensor:
    """W' - W [out, in], in theta's dtype, for W [out, in] and theta [out, in / 2]: to the last digit where angles are
    small."""
    odd, even = weight.to(theta.dtype).unflatten(1, (-1, 2)).unbind(2)
    # cos theta - 1 = -2 sin^2(theta / 2)
    less, sine = -2 * torch.sin(theta / 2) ** 2, torch.sin(theta)
    return torch.stack([odd * less - even * sine, odd * sine + even * less], 2).flatten(1)


class Rotation(nn.Module):
    """The angles of ``targets``, of rank ``rank``; B is drawn from (seed, target name) alone. export_rank: of the LoRA
    that is made of it."""

    def __init__(self, targets: Iterable[Target], rank: int, seed: int, export_rank: int) -> None:
        super().__init__()
        self._layers, self.export_rank = _Layers({target.name: target for target in targets}), export_rank
        self._names = sorted(self._layers)
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for target in (self._layers[name] for name in self._names):
            half = target.in_features // 2
            self.a.append(nn.Parameter(torch.zeros(target.out_rows, rank)))
            # Glorot's uniform numbers, as LoRaD has them
            uniform = torch.rand(rank, half, generator=generator(seed, "rotation", target.name))
            self.b.append(nn.Parameter((2 * uniform - 1) * math.sqrt(6 / (rank + half))))
        self._at = {name: index for index, name in enumerate(self._names)}
        self.before, self.after = frozenset[str](), frozenset(self._names)

    def theta(self, name: str) -> Tensor:
        at = self._at[name]
        return self.a[at] @ self.b[at]

    def on_input(self, name: str, x: Tensor, call: Call) -> Tensor:
        return x

    def on_output(self, name: str, x: Tensor, output: Tensor, call: Call) -> Tensor:
        weight: Any = self._layers[name].module.weight
        turned = change(weight.to(x.device), self.theta(name).to(x.device))
        return output + F.linear(x, turned.to(x.dtype)).to(output.dtype)

    @torch.no_grad()
    def exported(self) -> tuple[State, Kept]:
        """A LoRA of the difference, of ``export_rank`` at most, and how much of it that holds (`core.extraction`)."""
        state: State = {}
        layers: dict[str, Kept] = {}
        for name in self._names:
            weight: Any = self._layers[name].module.weight
            difference = change(weight.to(self.a[self._at[name]].device), self.theta(name)).cpu()
            if difference.any():
                state[name] = low_rank(difference, self.export_rank)
                layers[name] = kept(difference, state[name])
            else:
                a, b = difference.new_zeros(1, difference.shape[1]), difference.new_zeros(len(difference), 1)
                state[name] = a, b
        return state, in_all(layers)
