"""The loop every tiny network is trained with: AdamW, warm-up, linear decay, clipping, EMA, resumable checkpoints."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Loss = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    steps: updates; minutes: wall time at which the learning rate reaches 0 if the steps have not got there (0 = no
    limit; a limit makes the result depend on the machine's speed); ema: decay of the weight average.
    """

    steps: int
    lr: float
    minutes: float = 0.0
    warm_up: int = 200
    clip: float = 1.0
    ema: float = 0.999
    weight_decay: float = 0.01
    seed: int = 0
    log_every: int = 50
    save_seconds: float = 120.0


class Training:
    """One network (or several in a ModuleDict) on its way; everything random in a step comes from (seed, step)."""

    def __init__(self, modules: nn.Module, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=plan.lr, betas=(0.9, 0.99), weight_decay=plan.weight_decay, fused=True
        )
        self.step, self.seconds = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "checkpoint.pt").exists():
            self._load()

    def run(self, loss: Loss, snapshot: Callable[[], None] | None = None, snapshot_seconds: float = 300.0) -> None:
        """Train to the end of the plan; leaves the averaged weights in the modules."""
        saved = shown = 0.0
        began, losses = time.monotonic() - self.seconds, []
        while self.progress() < 1.0:
            losses.append(self._update(loss))
            self.seconds = time.monotonic() - began
            if self.step % self.plan.log_every == 0:
                self._log(losses)
                losses = []
            if self.seconds - saved > self.plan.save_seconds:
                self._save()
                saved = self.seconds
            if snapshot is not None and self.seconds - shown > snapshot_seconds:
                self.with_average(snapshot)
                shown = self.seconds
        self._save()
        self._swap()

    def progress(self) -> float:
        """Share of the plan that is done, in [0, 1]: by steps, or by the clock where it has a limit."""
        by_clock = self.seconds / (60.0 * self.plan.minutes) if self.plan.minutes else 0.0
        return min(1.0, max(self.step / self.plan.steps, by_clock))

    def with_average(self, action: Callable[[], None]) -> None:
        """Call action while the modules hold the averaged weights."""
        self._swap()
        try:
            action()
        finally:
            self._swap()

    def _update(self, loss: Loss) -> float:
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.step)
        rate = self.plan.lr * min(1.0, (self.step + 1) / self.plan.warm_up) * (1.0 - self.progress())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        value = loss(self.step, generator)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, self.plan.clip)
        self.optimizer.step()
        self.step += 1
        # A young average forgets its random start at once: decay 1/2 after 8 steps, the plan's after 1/(1 - ema).
        decay = min(self.plan.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1.0 - decay)
        return float(value.detach())

    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.average, strict=True):
            held = parameter.detach().clone()
            parameter.data.copy_(average)
            average.copy_(held)

    def _log(self, losses: list[float]) -> None:
        line = {"step": self.step, "loss": sum(losses) / len(losses), "seconds": round(self.seconds, 1)}
        with (self.folder / "loss.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        state = {
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average,
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "seconds": self.seconds,
        }
        torch.save(state, self.folder / "checkpoint.new")
        os.replace(self.folder / "checkpoint.new", self.folder / "checkpoint.pt")

    def _load(self) -> None:
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
            parameter.data.copy_(saved)
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
