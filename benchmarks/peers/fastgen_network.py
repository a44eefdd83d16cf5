"""A bundled model's network as one of FastGen's, and its methods' models of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from world import World, answered

from onestep.core.continuous import ContinuousVP
from onestep.core.roles import TEACHER
from onestep.training.engine.student import STUDENT

# by name: it is there where its checkout is
FastGenNetwork: Any = importlib.import_module("fastgen.networks.network").FastGenNetwork
AlphasNoiseSchedule: Any = importlib.import_module("fastgen.networks.noise_schedule").AlphasNoiseSchedule


class Network(FastGenNetwork):
    """role: whose adapters it has. schedule: "rf" of a flow model; of one that predicts noise "alphas", its own times,
    or "edm", any time in sigma / alpha: x = x0 + t eps is then brought to the model's scale, as FastGen's EDM networks
    do it within."""

    def __init__(self, world: World, role: str, schedule: str) -> None:
        flow = schedule == "rf"
        super().__init__("flow" if flow else "eps", "edm" if schedule == "alphas" else schedule)
        if schedule == "alphas":
            self.schedule_type = schedule
            self.noise_scheduler = AlphasNoiseSchedule(world.denoise.schedule.alphas_cumprod)
        self.network, self.role = world.network(role), role
        self.continuous = None if flow else ContinuousVP(world.denoise.schedule.alphas_cumprod)

    def requires_grad_(self, requires_grad: bool = True) -> Network:
        """Of the adapters alone: FastGen trains whole networks."""
        for name, value in self.named_parameters():
            value.requires_grad_(requires_grad and "lora_" in name)
        return self

    def reset_parameters(self) -> None:
        raise NotImplementedError("its weights are a bundled model's")

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Any = None,
        r: Tensor | None = None,
        return_logvar: bool = False,
        fwd_pred_type: str | None = None,
        **more: Any,
    ) -> Any:
        output = self._asked(x_t, t, r, condition)
        wanted = fwd_pred_type or self.net_pred_type
        found = self.noise_scheduler.convert_model_output(x_t, output, t, self.net_pred_type, wanted)
        # no learnt weight of the loss: log of 1
        return (found, torch.zeros(len(t), 1, dtype=t.dtype)) if return_logvar else found

    def _asked(self, x: Tensor, t: Tensor, r: Tensor | None, condition: Any) -> Tensor:
        if self.schedule_type != "edm":
            # a second time is told as OneStep tells it, t - r / 2
            return answered(self.network, x, 1000 * (t if r is None else t - r / 2), condition)
        assert self.continuous is not None
        sigma = t / (1 + t**2).sqrt()
        alpha = 1 / (1 + t**2).sqrt()
        time = self.continuous.time_of_sigma(sigma)
        return answered(self.network, x * alpha.reshape(-1, 1, 1, 1).to(x), time, condition)


def model(world: World, kind: str, schedule: str, **changes: Any) -> Any:
    """FastGen's model of that name ("cm", "scm", "mean_flow", "dmd2") with its own configuration, but for ``changes``:
    "loss_config.use_cd" and the like by their whole name, with __ for the dot."""
    made = importlib.import_module(f"fastgen.configs.methods.config_{kind}").create_config()
    config = made.model
    config.net = {"_target_": Network, "world": world, "role": STUDENT, "schedule": schedule}
    config.teacher = {**config.net, "role": TEACHER}
    config.device, config.precision, config.use_ema = "cpu", str(world.dtype).removeprefix("torch."), False
    config.input_shape = list(world.x0.shape[1:])
    for name, value in changes.items():
        *parts, last = name.split("__")
        part: Any = config
        for step in parts:
            part = getattr(part, step)
        setattr(part, last, value)
    found = type_of(kind)(config)
    found.on_train_begin()
    if hasattr(found, "_jvp"):
        found._jvp = partial(plainly, found._jvp)
    return found


def plainly(jvp: Callable[..., Tensor], *given: Any, **more: Any) -> Tensor:
    """``jvp`` without fused attention, which has no forward mode; FastGen sees to that on a card alone."""
    with sdpa_kernel(SDPBackend.MATH):
        return jvp(*given, **more)


def type_of(kind: str) -> Any:
    names = {"cm": "CMModel", "scm": "SCMModel", "mean_flow": "MeanFlowModel", "dmd2": "DMD2Model"}
    return getattr(importlib.import_module("fastgen.methods"), names[kind])


def network_of(found: Any) -> nn.Module:
    """diffusers' network in a FastGen model's student."""
    return found.net.network
