"""Guidance distilled on noised pictures, in closed form and at its fixed point."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from every_method import host_of, short
from mutations import must_fail, mutant
from oracles import CASES, TAU, At, Case, ExactGuidance, World, drawn, rows
from small_host import SmallHost, small
from whole_runs import run

from onestep.core.errors import OneStepError
from onestep.training.engine.levels import WEIGHTS, natural
from onestep.training.engine.student import STUDENT
from onestep.training.methods import METHODS
from onestep.training.methods import guided_answers as method

WORLDS = [case for case in CASES if case.name != "x0"]


def weight_of(world: World) -> float:
    """In x0, of an error of what the network predicts."""
    alpha, sigma = world.case.alpha, world.case.sigma
    if "flow" in world.case.name:
        return 1 / sigma**2
    return alpha**2 / sigma**2 + (0 if world.case.answers == "eps" else 1)


def answers(module: ModuleType, world: World, low: float, high: float, conditioned: bool) -> Any:
    weight = WEIGHTS[natural(world.denoise)]
    return module.GuidedAnswers(low, high, At(world.case.sigma), weight, conditioned)


def check(module: ModuleType, case: Case) -> None:
    world, batch, x = World(case), World(case).batch(), drawn(seed=1)
    loss = answers(module, world, 2.0, 5.0, False)(world.denoise, batch, x)
    loss.backward()
    alpha, sigma = case.alpha, case.sigma
    x_t = alpha * rows(x) + sigma * rows(batch.normal("guided noise"))
    w = 2 + 3 * batch.uniform("guided scale").numpy()[:, None]
    d_c, d_u = (world.x0("teacher", x_t, cond) for cond in (world.cond, world.cond.null_like(world.null)))
    error = world.x0(STUDENT, x_t, world.cond) - (d_u + w * (d_c - d_u))
    assert float(loss.detach()) == pytest.approx(weight_of(world) * (error**2).sum(1).mean(), rel=1e-7)
    world.check_gradient(weight_of(world) * 2 * error / 4 * sigma**2 / (alpha**2 * TAU**2 + sigma**2))


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_the_loss_and_its_gradient_in_closed_form(case: Case) -> None:
    check(method, case)


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_a_student_that_guides_exactly_has_nothing_to_learn(case: Case) -> None:
    """Told the scale of each sample; at another scale it has."""
    world, x = World(case), drawn()
    world.roles.drop("student")
    world.roles.add_module("student", ExactGuidance(torch.tensor(world.mean("teacher", world.null))))
    right = answers(method, world, 1.0, 14.0, True)(world.denoise, world.batch(), x)
    right.backward()
    assert float(right.detach()) < 1e-16
    assert float(world.roles.modules["student"].null.grad.abs().max()) < 1e-6
    told = world.batch().uniform("guided scale")
    assert np.ptp(told.numpy()) > 0.1


MUTANTS: dict[str, tuple[str, str]] = {
    "one scale for all": ('w = self.low + (self.high - self.low) * batch.uniform("guided scale")', "w = self.low"),
    "the target learnt too": ("denoise.roles.use(TEACHER)", "denoise.roles.use(STUDENT)"),
    "unweighed": ("cast_as(at(self.weight, denoise.schedule, sigma), error) * error", "error"),
    "a mean for a sum": (".flatten(1).sum(1)", ".flatten(1).mean(1)"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_loss_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.guided_answers", *change, monkeypatch)
    must_fail(lambda mutated: check(mutated, CASES[2]), module)


def test_what_the_student_is_told(tmp_path: Path) -> None:
    """An adapter is, a LoRA is not; neither is made of a base without guidance, or in more steps than a recipe has."""
    assert METHODS["guided-distillation"].makes == "adapter" and METHODS["lora-guided"].makes == "LoRA"
    for name in ("guided-distillation", "lora-guided"):
        with pytest.raises(OneStepError, match="draws in 100 steps: set teacher_steps to at most 64"):
            small(method=name, teacher_steps=100)
        host = SmallHost()
        host.denoiser.guidance = "none"
        with pytest.raises(OneStepError, match=f"has no guidance that {name} could learn"):
            run(tmp_path / name, small(method=name), host=host)
    with pytest.raises(OneStepError, match="guidance_low 5 must not be above guidance_high 2"):
        small(method="guided-distillation", guidance_low=5.0, guidance_high=2.0)
    with pytest.raises(OneStepError, match="has places of its own: set targets=all"):
        METHODS["guided-distillation"].check(
            host_of("guided-distillation"), small(**short("guided-distillation", tmp_path), targets="attention")
        )
