"""AdamW or Muon over one role's tensors, their step size as a function of the update, their state as plain tensors."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from ...core.errors import OneStepError
from ..settings import Settings


def rate(update: int, updates: int, height: float, settings: Settings) -> float:
    """Step size at ``update`` of ``updates``: a linear rise over ``warm_up``, then a cosine to ``final_rate`` of
    ``height``."""
    rise = min(1.0, (update + 1) / max(1, settings.warm_up))
    along = min(1.0, update / max(1, updates))
    fall = settings.final_rate + (1 - settings.final_rate) * (1 + math.cos(math.pi * along)) / 2
    return height * rise * fall


def eight_bit() -> Any:
    """bitsandbytes' AdamW8bit where it can be imported, else None."""
    try:
        return importlib.import_module("bitsandbytes").optim.AdamW8bit
    except Exception:  # a broken build of bitsandbytes raises anything from ImportError to OSError
        return None


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


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for matrices (arXiv:2502.16982: steps as large as AdamW's, 0.2 sqrt(max(rows, columns)) of an orthogonal
    matrix), AdamW for all else. The first moments of both decay by betas[0]."""

    def __init__(self, parameters: list[Tensor], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        matrices, rest = ([p for p in parameters if (p.ndim == 2) is flat] for flat in (True, False))
        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self._muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options) if matrices else None
        self._adam = torch.optim.AdamW(rest, betas=betas, **options) if rest else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        for part in filter(None, (self._muon, self._adam)):
            # one state for both, by tensor: it is saved and restored as this optimiser's
            part.state = self.state
            now = {"lr": group["lr"], "betas": group["betas"], "momentum": group["betas"][0]}
            part.param_groups[0].update({name: now[name] for name in now.keys() & part.param_groups[0].keys()})
            part.step(closure)
        for value in self._muon.param_groups[0]["params"] if self._muon else ():
            if value.grad is not None:
                self.state[value]["step"] = self.state[value].get("step", 0) + 1


def make(parameters: list[Tensor], settings: Settings) -> torch.optim.Optimizer:
    """What ``settings.optimizer`` names; "auto" is AdamW, with 8-bit moments where bitsandbytes works and the tensors
    are on a GPU."""
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (0.9, 0.99),
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "muon":
        return MuonWithAdamW(parameters, **options)
    on_gpu = bool(parameters) and parameters[0].is_cuda
    small = eight_bit() if settings.optimizer == "adamw8bit" or (settings.optimizer == "auto" and on_gpu) else None
    return (small or torch.optim.AdamW)(parameters, **options)  # type: ignore[no-any-return]


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
            optimizer.state.setdefault(parameter, {})[name] = _placed(name, value, parameter)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _placed(name: str, value: Any, parameter: Tensor) -> Any:
    """A copy on the parameter's device; torch's count of steps stays on the CPU, where its optimisers read it."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if name == "step" else value.to(parameter.device, copy=True)
