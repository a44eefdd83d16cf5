"""Small networks to hang roles on: plain layers, fused ones, layers that cast when they are used."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestep.core.roles import Roles
from onestep.core.targets import Target


class Mixed(nn.Module):
    """Convolutions with stride, padding and dilation, a 1 x 1 one, and Linears: [B, 3, 8, 8] -> [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 6, (3, 1), padding=(2, 0), dilation=(2, 1))
        self.point = nn.Conv2d(6, 4, 1, bias=False)
        self.linear, self.last = nn.Linear(4, 7), nn.Linear(7, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        tokens = self.point(h).flatten(2).mT
        return self.last(torch.tanh(self.linear(tokens))).mean(1)


class CastOnUse(nn.Linear):
    """As ComfyUI's manual_cast layers: stored in a narrow type, multiplied in the input's."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class CastOnUseConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self.weight.to(x.dtype), bias)


class Stored(nn.Module):
    """Cast-on-use layers whose weights are stored in ``dtype``: [B, 3, 6, 6] -> [B, 36, 5]."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv, self.linear = CastOnUseConv(3, 4, 3, padding=1), CastOnUse(4, 5)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.conv(x)).flatten(2).mT)


def targets_of(network: nn.Module) -> list[Target]:
    layers = ((name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return [Target(name, module) for name, module in layers]


def roles_on(network: nn.Module, *, rank: int = 2, dtype: torch.dtype = torch.float32, **seeds: int) -> Roles:
    """Roles with random factors away from B = 0, installed; ``seeds``: a lineage for each role's name."""
    roles = Roles(targets_of(network))
    for number, (role, seed) in enumerate(seeds.items()):
        roles.add(role, rank, seed)
        scatter(roles, role, 100 + number, dtype)
    roles.install()
    return roles


def scatter(roles: Roles, role: str, seed: int, dtype: torch.dtype = torch.float32, size: float = 0.3) -> None:
    """Move a role's factors to random places, in ``dtype`` (float64 for exact comparisons)."""
    draw = torch.Generator().manual_seed(seed)
    moved: dict[str, Any] = {}
    for name, (a, b) in sorted(roles.state(role).items()):
        pair = [factor + size * torch.randn(factor.shape, generator=draw) for factor in (a, b)]
        moved[name] = tuple(factor.to(dtype).requires_grad_() for factor in pair)
    roles._factors[role] = moved


def delta(roles: Roles, role: str) -> dict[str, Tensor]:
    """B A of each target, [out, in * kh * kw], float64."""
    return {name: b.double().flatten(1) @ a.double().flatten(1) for name, (a, b) in roles.state(role).items()}


def call(
    roles: Roles, network: nn.Module, x: Tensor, role: str | list[tuple[str, int]], *, train: bool = True
) -> Tensor:
    """One forward of ``network`` as the wrappers make it: its role map captured, its result guarded."""
    chosen = roles.use(role, train=train) if isinstance(role, str) else roles.rows(role, train=train)
    with chosen:
        captured = roles.capture(len(x))
    with captured:
        out = network(x)
    return captured.guard(out)
