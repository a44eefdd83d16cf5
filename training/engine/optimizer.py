"""AdamW or Muon over one role's tensors, their step size as a function of the update, their state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...core.errors import OneStepError
from ..settings import Settings
from .eight_bit import eight_bit


def rate(update: int, updates: int, height: float, settings: Settings) -> float:
    """Step size at ``update`` of ``updates``: a linear rise over ``warm_up``, then a cosine to ``final_rate`` of
    ``height``."""
    rise = min(1.0, (update + 1) / max(1, settings.warm_up))
    along = min(1.0, update / max(1, updates))
    fall = settings.final_rate + (1 - settings.final_rate) * (1 + math.cos(math.pi * along)) / 2
    return height * rise * fall


def refuse_missing(settings: Settings) -> None:
    """Raises OneStepError where the optimiser that ``settings`` ask for is not there."""
    if settings.optimizer == "adamw8bit" and eight_bit() is None:
        raise OneStepError(
            "optimizer is 'adamw8bit', but bitsandbytes cannot be imported here: install it, or set optimizer=adamw"
        )
    if settings.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise OneStepError(
            f"optimizer is 'muon', which torch has from 2.9 on, and this is {torch.__version__}: set optimizer=adamw"
        )


@contextmanager
def _first_moments(state: Any, parameters: list[Tensor], name: str, betas: tuple[float, float]) -> Iterator[None]:
    """Within a step, ``state`` has the first moments that its equation reads, under ``name``; after it, those alone
    that the next step reads.

    m_n = b m_(n-1) + (1 - b) g_n (arXiv:1412.6980, Algorithm 1) is g_n itself where b = 0: it is lent, and not kept.
    Where b is above 0 again, m begins anew from the first gradient, m_n = (1 - b^n) g_n, as it does at n = 1.
    """
    beta = betas[0]
    stepped = [(state[value], value.grad) for value in parameters if value.grad is not None]
    for entries, gradient in stepped:
        if beta == 0:
            entries[name] = gradient
        elif name not in entries:
            entries[name] = gradient * (1 - beta ** float(entries["step"]))
    yield
    if beta == 0:
        for entries, _ in stepped:
            del entries[name]


FIRST = ("exp_avg", "momentum_buffer", "state1", "absmax1")
"""What optimisers call the first moment: torch's AdamW and Muon, bitsandbytes' of 8 bits and their scales."""


def forget_first_moments(optimizer: torch.optim.Optimizer) -> None:
    """Free those of steps taken, where the next one's decay is 0 and reads none."""
    for entries in optimizer.state.values():
        for name in FIRST:
            entries.pop(name, None)


class AdamW(torch.optim.AdamW):
    """torch's, to the bit, without a first moment as long as its decay is 0."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        for value in group["params"]:
            if value.grad is not None and not self.state[value]:
                place = value.device if group["fused"] else "cpu"
                self.state[value]["step"] = torch.zeros((), dtype=torch.float32, device=place)
                self.state[value]["exp_avg_sq"] = torch.zeros_like(value, memory_format=torch.preserve_format)
        with _first_moments(self.state, group["params"], "exp_avg", group["betas"]):
            super().step(closure)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for matrices (arXiv:2502.16982: steps as large as AdamW's, 0.2 sqrt(max(rows, columns)) of an orthogonal
    matrix), AdamW for all else. The first moments of both decay by betas[0]."""

    def __init__(
        self, parameters: list[Tensor], lr: float, betas: tuple[float, float], weight_decay: float, **form: Any
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, **form})
        matrices, rest = ([p for p in parameters if (p.ndim == 2) is flat] for flat in (True, False))
        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self._muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options) if matrices else None
        self._adam = AdamW(rest, betas=betas, **options, **form) if rest else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        for part in filter(None, (self._muon, self._adam)):
            # one state for both, by tensor: it is saved and restored as this optimiser's
            part.state = self.state
            now = {"lr": group["lr"], "betas": group["betas"], "momentum": group["betas"][0]}
            part.param_groups[0].update({name: now[name] for name in now.keys() & part.param_groups[0].keys()})
        if self._adam is not None:
            self._adam.step(closure)
        if self._muon is not None:
            self._orthogonal(self._muon, closure)

    def _orthogonal(self, muon: torch.optim.Optimizer, closure: Any) -> None:
        """Muon's step, and its count of steps, which it does not keep."""
        values = [value for value in muon.param_groups[0]["params"] if value.grad is not None]
        for value in values:
            self.state[value].setdefault("step", 0)
        with _first_moments(self.state, values, "momentum_buffer", self.param_groups[0]["betas"]):
            muon.step(closure)
        for value in values:
            self.state[value]["step"] += 1


def make(parameters: list[Tensor], settings: Settings) -> torch.optim.Optimizer:
    """What ``settings.optimizer`` names; "auto" is AdamW, with 8-bit moments where bitsandbytes works and the tensors
    are on a GPU. AdamW's step is one kernel there, which needs no copy of the second moments' roots."""
    on_gpu = bool(parameters) and parameters[0].is_cuda
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (0.9, 0.99),
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "muon":
        return MuonWithAdamW(parameters, **options, fused=on_gpu)
    small = eight_bit() if settings.optimizer == "adamw8bit" or (settings.optimizer == "auto" and on_gpu) else None
    return small(parameters, **options) if small else AdamW(parameters, **options, fused=on_gpu)  # type: ignore[no-any-return]


def steps_of(optimizer: torch.optim.Optimizer) -> int:
    """Steps that ``optimizer`` has taken."""
    return max((int(entries["step"]) for entries in optimizer.state.values()), default=0)


def pack(optimizer: torch.optim.Optimizer, prefix: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The optimiser's moments as named tensors, and its plain numbers, by the place of their parameter.

    Read from `Optimizer.state`: state_dict() is what an optimiser makes of it, and bitsandbytes from 0.49 on makes a
    dictionary within it.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            where: Any = tensors if isinstance(value, Tensor) else numbers
            where[f"{prefix}.{index}.{name}"] = value
    return tensors, numbers


def unpack(
    optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor], numbers: dict[str, float]
) -> None:
    """Restore what :func:`pack` gave, each tensor in its own dtype, on its parameter's device."""
    parameters = _parameters(optimizer)
    optimizer.state.clear()
    for key, value in {**tensors, **numbers}.items():
        owner, index, name = key.rsplit(".", 2)
        if owner == prefix:
            parameter = parameters[int(index)]
            fused = bool(optimizer.param_groups[0].get("fused"))
            optimizer.state.setdefault(parameter, {})[name] = _placed(name, value, parameter, fused)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _placed(name: str, value: Any, parameter: Tensor, fused: bool) -> Any:
    """A copy on the parameter's device; torch's count of steps stays on the CPU, where its optimisers read it, but for
    those whose step is one kernel."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if name == "step" and not fused else value.to(parameter.device, copy=True)
