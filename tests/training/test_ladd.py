"""LADD: the discriminator alone, on several blocks, cell by cell, at logit-normal levels; whole runs that go on."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from best_head import BestHead, looking_at
from mutations import must_fail, mutant
from narrowed import narrowed
from oracles import CASES, At, Case, World
from small_host import SmallHost, setup_of, small
from whole_runs import cancelled_and_whole, factors, newest, run

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.core.tensor_file import read_tensors
from onestep.training.engine.levels import LogitNormalTime
from onestep.training.engine.student import add_student, generate
from onestep.training.methods import METHODS, ladd, settings_for
from onestep.training.methods.discriminator import LOSSES, Discriminator

FLOW_AT_ONE, ZERO_TERMINAL = CASES[5], CASES[6]
PREDICTIONS = ["epsilon", "v_prediction", "flow"]


@pytest.mark.parametrize("case", [FLOW_AT_ONE, ZERO_TERMINAL], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_updates_bring_the_student_to_its_teacher(case: Case, loss: str) -> None:
    """With the best head of the student as it is, at one level: |m_s - m_t| falls with each of the first updates."""
    world, gaps = World(case), []
    recipe, level = Recipe.for_student(world.schedule, 1, "unet", ()), 0.4
    for step in range(100):
        batch = world.batch(step=step)
        sigma = world.schedule.sigma_at(torch.tensor([level], dtype=torch.float64))
        head = BestHead(world)
        head.alpha, head.sigma = float(world.schedule.alpha(sigma)), float(sigma)
        head.variance = head.alpha**2 * 0.7**2 + head.sigma**2
        judge = Discriminator(head, looking_at(world), LOSSES[loss], At(float(sigma)))
        gaps.append(float(np.square(world.mean("student", world.cond) - world.mean("teacher", world.cond)).sum()))
        x = generate(world.denoise, recipe, batch)
        told, _ = judge.cotangent(world.denoise, batch, x)
        x.backward(told / len(batch))
        for factor in world.roles.parameters("student"):
            assert factor.grad is not None
            factor.detach().sub_(0.005 * factor.grad)
            factor.grad = None
    assert all(later < earlier for earlier, later in zip(gaps[:8], gaps[1:8], strict=False))
    assert gaps[-1] < 0.3 * gaps[0]


def planned(module: Any, folder: Path, prediction: str, **changes: Any) -> tuple[Any, Any]:
    """A host whose student has learnt something, and the student's turn."""
    settings = small(method="ladd", head_blocks=2, **changes)
    host = SmallHost(prediction)
    host.denoiser.roles.install()
    add_student(host, settings, None)
    with torch.no_grad():
        for _, b in host.denoiser.roles.state("student").values():
            b.add_(0.1 * torch.randn(b.shape, generator=torch.Generator().manual_seed(2)))
    turn = module.plan(setup_of(host, settings, folder)).phases[-1].turns[-1]
    for leave in turn.loss.__self__.head.discriminator.head.leave:
        torch.nn.init.normal_(leave.weight, generator=torch.Generator().manual_seed(9))
    return host, turn.loss


def check_turn(module: Any, folder: Path, prediction: str) -> None:
    """The gradients of share times the discriminator's term, a mean over samples; with an anchor, of both."""
    host, learn = planned(module, folder, prediction, anchor=0.5)
    own, share = learn.__self__, 0.25
    head = own.head
    batch = head.setup.prompts.batch(40, range(4))
    learn(batch, share, 3)
    found = [factor.grad.clone() for factor in host.denoiser.roles.parameters("student")]
    for factor in host.denoiser.roles.parameters("student"):
        factor.grad = None
    x0 = head.simulate(batch).x0
    told, _ = head.discriminator.cotangent(host.denoiser, batch, x0)
    (x0 * told).sum().mul(share / 4).backward()
    own.beside(batch, share * 0.5, 3)
    for gradient, factor in zip(found, host.denoiser.roles.parameters("student"), strict=True):
        torch.testing.assert_close(gradient, factor.grad, rtol=1e-4, atol=1e-6)
    host.denoiser.roles.remove()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_student_learns_from_the_discriminator_alone(prediction: str, tmp_path: Path) -> None:
    check_turn(ladd, tmp_path, prediction)


MUTANTS = {
    "a sum over samples": ("(share / len(batch))", "share"),
    "the wrong way": ("x0.backward(cotangent", "x0.backward(-cotangent"),
    "the anchor unweighted": ("share * anchor", "share"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_turn_is_found_out(change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: ModuleType = mutant("onestep.training.methods.ladd", *change, monkeypatch)
    must_fail(lambda mutated: check_turn(mutated, tmp_path, "flow"), module)


def test_its_head_is_the_papers(tmp_path: Path) -> None:
    """Hinge, several blocks, a logit a cell, levels whose logit is normal around 1; the teacher's pairs as real."""
    _, learn = planned(ladd, tmp_path, "flow")
    judge = learn.__self__.head.discriminator
    assert judge.loss is LOSSES["hinge"] and judge.levels == LogitNormalTime(1.0, 1.0)
    assert len(judge.head.enter) == 2 and judge.head.cells
    assert settings_for("ladd").own.head_blocks == 4


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_run_learns_without_a_critic(prediction: str, tmp_path: Path) -> None:
    told = {"head_blocks": 2, "head_warm_up": 2, "head_updates": 2}
    made = run(tmp_path / "run", small(method="ladd", **told), host=SmallHost(prediction))
    state = read_tensors(newest(tmp_path / "run") / "state.safetensors")
    assert {name.split("/")[0] for name in state if "/" in name} == {"student", "ema", "head"}
    phases = [line["phase"] for line in made.metrics if line["update"]]
    assert phases == ["warm start"] * 3 + ["head"] * 2 + ["ladd"] * 4
    last = made.metrics[-1]
    assert all(name in last for name in ("head", "gan", "head_real", "head_fake", "student_norm", "distance"))
    assert any(bool(value.any()) for name, value in read_tensors(made.path).items() if "lora_up" in name)


@pytest.mark.parametrize("poll", narrowed([16, 27], 27))
def test_a_run_that_is_stopped_ends_as_if_not(poll: int, tmp_path: Path) -> None:
    settings = small(method="ladd", head_blocks=2, head_warm_up=1, head_penalty=0.5, anchor=0.3, student_steps=2)
    cut, whole = cancelled_and_whole(tmp_path, settings, poll)
    assert whole["files"] == cut["files"] and whole["metrics"] == cut["metrics"]
    other = run(tmp_path / "other" / "run", settings.with_(head_penalty=0.0))
    assert factors(other.path) != factors(tmp_path / "whole" / "run" / "result.safetensors")


def test_what_it_cannot_do_is_refused() -> None:
    check, host = METHODS["ladd"].check, SmallHost()
    check(host, settings_for("ladd"))
    host.blocks = []
    with pytest.raises(OneStepError, match="no blocks .* could look at: choose a method without a head"):
        check(host, settings_for("ladd"))
    with pytest.raises(OneStepError, match="steps and warm_start are both 0"):
        settings_for("ladd", steps=0, warm_start=0)
