"""Our lcm beside diffusers' train_lcm_distill_lora_sdxl.py and _sd_wds.py.

Their training step is one part of a long main(); here it is put together anew of the functions that the script defines
(scalings_for_boundary_conditions, get_predicted_original_sample, get_predicted_noise, DDIMSolver), in its order and
with its five calls of the network: the student at x_t, the teacher with and without the prompt (adapters disabled), the
student at x_r. Left out is its `.float()` before the loss, so that float64 stays what it is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from difference import Row, row
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn.functional import mse_loss
from world import Outcome, World, answered

from onestep.core.cond import Cond
from onestep.training.engine.student import STUDENT
from onestep.training.methods.lcm import with_skip
from onestep.training.methods.trajectory import Distance, Huber, Noised, Span, TeacherSteps, TwoTimes, square

SCRIPTS = ("train_lcm_distill_lora_sd_wds", "train_lcm_distill_lora_sdxl")
LEVELS, HUBER_C, W = 50, 1e-3, 6.0
"""The scripts' defaults of num_ddim_timesteps and huber_c; a w of U[w_min, w_max] = U[3, 15]."""
INDEX = torch.tensor([49, 30, 12, 3])
"""Of each sample's pair of times; 0 is the last, which ends in the picture."""


def script(folder: Path, name: str) -> Any:
    """The script as a module: what it imports must be there (torchvision, datasets, webdataset, braceexpand)."""
    spec = importlib.util.spec_from_file_location(name, folder / "consistency_distillation" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class ScriptStep:
    """uncond: what its teacher is asked without the prompt. scheduler: diffusers' own, whose schedule is float32."""

    script: Any
    network: Any
    scheduler: Any
    cond: Cond
    uncond: Cond
    loss_type: str = "l2"

    @classmethod
    def of(cls, script: Any, world: World, uncond: Cond, loss_type: str, exact: bool = False) -> ScriptStep:
        scheduler = DDPMScheduler.from_config(world.host.pipe.scheduler.config)
        if exact:
            scheduler.alphas_cumprod = world.denoise.schedule.alphas_cumprod
        return cls(script, world.network(STUDENT), scheduler, world.batch.cond, uncond, loss_type)

    def __call__(self, x0: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        # made once in main(), and cheap
        solver = self.script.DDIMSolver(self.scheduler.alphas_cumprod.double().numpy(), 1000, LEVELS)
        start = solver.ddim_timesteps[index]
        end = (start - 1000 // LEVELS).clamp_min(0)
        x = self.scheduler.add_noise(x0, noise, start)
        answer = self._answer(x, start)
        self.network.disable_adapters()
        with torch.no_grad():
            pairs = [self._both(x, start, cond) for cond in (self.cond, self.uncond)]
            moved = [with_text + W * (with_text - without) for with_text, without in zip(*pairs, strict=True)]
            x_r = solver.ddim_step(*moved, index).to(x.dtype)
        self.network.enable_adapters()
        with torch.no_grad():
            target = self._answer(x_r, end)
        if self.loss_type == "l2":
            return mse_loss(answer, target)
        return (torch.sqrt((answer - target) ** 2 + HUBER_C**2) - HUBER_C).mean()

    def _answer(self, x: Tensor, time: Tensor) -> Tensor:
        scalings = self.script.scalings_for_boundary_conditions(time)
        c_skip, c_out = (self.script.append_dims(value, x.ndim) for value in scalings)
        return c_skip * x + c_out * self._x0(answered(self.network, x, time, self.cond), x, time)

    def _both(self, x: Tensor, time: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        output = answered(self.network, x, time, cond)
        return self._x0(output, x, time), self._of(self.script.get_predicted_noise, output, x, time)

    def _x0(self, output: Tensor, x: Tensor, time: Tensor) -> Tensor:
        return self._of(self.script.get_predicted_original_sample, output, x, time)

    def _of(self, function: Any, output: Tensor, x: Tensor, time: Tensor) -> Tensor:
        abar = self.scheduler.alphas_cumprod.to(x)
        return function(output, time, x, self.scheduler.config.prediction_type, abar.sqrt(), (1 - abar).sqrt())


def ours(world: World, index: Tensor, w: float, distance: Distance, null: Cond | None, at_zero: bool) -> Tensor:
    """Our lcm's own objective, at the script's times. at_zero: whether the last ends at time 0, as theirs."""

    def times(schedule: Any, batch: Any, u: Tensor) -> Span:
        start = index * (1000 // LEVELS) + 1000 // LEVELS - 1
        end = start - 1000 // LEVELS
        lower = (
            schedule.sigma_of_time(end.clamp_min(0))
            if at_zero
            else torch.where(end < 0, 0.0, schedule.sigma_of_time(end))
        )
        return Span(torch.stack([schedule.sigma_of_time(start), lower]), torch.zeros_like(lower))

    batch = world.batch if null is None else replace(world.batch, null=null[:1])
    objective = TwoTimes(times, TeacherSteps(w, w), distance, answer=with_skip)
    loss = objective(world.denoise, batch, Noised(world.x0, world.noise, torch.zeros(len(index))))
    loss.backward()
    return loss.detach()


def zeros(cond: Cond) -> Cond:
    return Cond(torch.zeros_like(cond.text))


def rows(folder: Path) -> Iterator[Row]:
    world = World("tiny")
    huber, zero = Huber(HUBER_C), zeros(world.nulls)
    for name in SCRIPTS:
        line = partial(row, f"diffusers {name}", "lcm", "tiny")
        module = script(folder, name)
        theirs = partial(script_outcome, world, module)
        defaults = our_outcome(world, INDEX, W, huber), theirs("l2", zero, INDEX, exact=False)
        yield line("each by its defaults, w told alike", *defaults)
        agreed = partial(line, scale=1 / world.x0[0].numel())
        for loss_type, distance in (("huber", huber), ("l2", square)):
            mine = our_outcome(world, INDEX, W + 1, distance, zero)
            told = f"{loss_type}, our w + 1, our null text zeros, a mean over elements"
            yield agreed(f"{told}, their schedule in float32", mine, theirs(loss_type, zero, INDEX, exact=False))
            yield agreed(f"{told}, one schedule", mine, theirs(loss_type, zero, INDEX))
        last = torch.zeros_like(INDEX)
        mine = our_outcome(world, last, W + 1, square, zero)
        yield agreed("the same, l2, in the last interval alone", mine, theirs("l2", zero, last))
        mine = our_outcome(world, last, W + 1, square, zero, at_zero=True)
        yield agreed("the same, ours ending at time 0 as well", mine, theirs("l2", zero, last))


def script_outcome(
    world: World, module: Any, loss_type: str, uncond: Cond, index: Tensor, exact: bool = True
) -> Outcome:
    step = ScriptStep.of(module, world, uncond, loss_type, exact)
    return world.theirs(step.network, lambda: step(world.x0, world.noise, index))


def our_outcome(
    world: World, index: Tensor, w: float, distance: Distance, null: Cond | None = None, at_zero: bool = False
) -> Outcome:
    return world.ours(lambda: ours(world, index, w, distance, null, at_zero))
