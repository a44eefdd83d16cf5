"""DisBack: snapshots of the critic on its way to the untrained student, and a teacher that comes back by them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from narrowed import narrowed
from oracles import CASES, At, Case, World, drawn, rows
from small_host import SmallHost, setup_of, small
from whole_runs import Cancelled, at_call, factors, left, run

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.core.tensor_file import read_tensors
from onestep.training.engine.student import add_student, generate
from onestep.training.engine.trainer import Trainer
from onestep.training.methods import METHODS, degradation, settings_for
from onestep.training.methods.degradation import DEGRADED, Degradation
from onestep.training.methods.disback import disback
from onestep.training.methods.dmd import dmd

THREE = [CASES[0], CASES[2], CASES[4]]
"""eps, v and flow."""
TOLD: dict[str, Any] = {"method": "disback", "snapshots": 2, "critic_warm_up": 4, "steps": 6, "backtrack": 0.7}


# -- the loss ---------------------------------------------------------------------------------------------------------


def with_snapshot(world: World) -> World:
    """A role between the teacher and the critic."""
    world.roles.copy("critic", DEGRADED)
    for _, b in world.roles.state(DEGRADED).values():
        b.mul_(0.4)
    return world


@pytest.mark.parametrize("case", THREE, ids=str)
def test_the_snapshot_is_the_teacher_with_the_prompt_and_without(case: Case) -> None:
    """DMD's gradient with D of the snapshot in the place of the base's, until the way back is behind."""
    world, x, k = with_snapshot(World(case)), drawn(), 3.0
    settings = settings_for("disback", matching_guidance=k, backtrack=0.5)
    for along, role in ((0.0, DEGRADED), (0.49, DEGRADED), (0.5, "teacher"), (1.0, "teacher")):
        made = replace(disback(settings, along), levels=At(case.sigma))
        found, _ = made.cotangent(world.denoise, world.batch(), x)
        x_s = case.alpha * rows(x) + case.sigma * rows(world.batch().normal("match noise"))
        d_c, d_u = (world.x0(role, x_s, cond) for cond in (world.cond, world.null.repeat(4)))
        real = d_u + k * (d_c - d_u)
        weight = 1 / np.abs(rows(x) - real).mean(1, keepdims=True)
        np.testing.assert_allclose(rows(found), weight * (world.x0("critic", x_s, world.cond) - real), rtol=1e-8)
    assert replace(disback(settings, 0.7)) == dmd(settings_for("dmd", matching_guidance=k), 0.7)


@pytest.mark.parametrize("case", THREE, ids=str)
def test_a_critic_that_is_the_snapshot_leaves_nothing(case: Case) -> None:
    """As it is where the way back begins, if the critic has learnt the student: no step is a long one."""
    world, x = with_snapshot(World(case)), drawn()
    world.roles.copy(DEGRADED, "critic")
    made = replace(disback(settings_for("disback", matching_guidance=1.0)), levels=At(case.sigma))
    found, _ = made.cotangent(world.denoise, world.batch(), x)
    assert float(found.abs().max()) <= 1e-12


@pytest.mark.parametrize("case", [CASES[5], CASES[6]], ids=str)
def test_the_student_goes_to_the_snapshot_and_then_to_the_base(case: Case) -> None:
    """From pure noise a student's picture is its mean; descent with an exact critic lowers the divergence from each
    teacher in turn."""
    world = with_snapshot(World(case))
    world.roles.copy("student", "critic")
    recipe = Recipe.for_student(world.schedule, 1, "unet", ())

    def gap(role: str) -> float:
        return float(np.square(world.mean("student", world.cond) - world.mean(role, world.cond)).sum())

    for along, role in ((0.0, DEGRADED), (1.0, "teacher")):
        made, before = disback(settings_for("disback", matching_guidance=1.0), along), gap(role)
        for step in range(60):
            batch = world.batch(step=step)
            x = generate(world.denoise, recipe, batch)
            g, _ = made.cotangent(world.denoise, batch, x)
            x.backward(g / len(batch))
            for factor in world.roles.parameters("student"):
                assert factor.grad is not None
                factor.detach().sub_(0.05 * factor.grad)
                factor.grad = None
            world.roles.lerp("critic", "student", 1.0)
        assert gap(role) < 0.1 * before


# -- the way ----------------------------------------------------------------------------------------------------------


def check_way(module: ModuleType, folder: Path) -> None:
    """Of 3 snapshots in 10 updates from 5 on: after the 3rd, the 6th and the 10th. Back through them in the first 6 of
    12 updates, two each, from the last on; then the base."""
    world = World(CASES[0])
    way = module.Degradation(world.roles, folder, 3, 5, 10, 12, 0.5, 4)
    assert {update: way.due(update) for update in range(30) if way.due(update)} == {8: 1, 11: 2, 15: 3}
    assert [way.at(update) for update in range(15, 27)] == [3, 3, 2, 2, 1, 1] + [0] * 6
    assert [way.at(update) for update in (0, 5, 14)] == [3, 3, 3]


def test_when_snapshots_are_taken_and_used(tmp_path: Path) -> None:
    check_way(degradation, tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.29, 0.3, 0.55, 0.57, 0.7, 1.0])
def test_whoever_is_asked_is_held(share: float, tmp_path: Path) -> None:
    """The objective and the files agree at every update, however a share is rounded."""
    way = Degradation(World(CASES[0]).roles, tmp_path, 7, 0, 7, 100, share, 2)
    settings = settings_for("disback", backtrack=share)
    for index in range(100):
        asked = disback(settings, index / 100).teacher
        assert (way.at(7 + index) > 0) == (asked == DEGRADED)


class Made:
    """A trainer as a run makes it, within its hooks."""

    def __init__(self, stack: ExitStack, folder: Path, **changes: Any) -> None:
        self.host, settings = SmallHost(), small(**TOLD | changes)
        setup = setup_of(self.host, settings, folder)
        self.roles = self.host.denoiser.roles
        add_student(self.host, settings, None)
        self.roles.copy("student", "ema")
        self.plan = METHODS["disback"].plan(setup)
        stack.enter_context(self.roles.installed())
        self.trainer = Trainer(self.host, settings, setup.recipe, setup.prompts, self.plan)

    def factors(self, role: str) -> dict[str, torch.Tensor]:
        state = self.roles.state(role)
        return {f"{name}/{side}": pair["ab".index(side)].clone() for name, pair in state.items() for side in "ab"}


def check_files(folder: Path) -> None:
    """Each file holds the critic as its update begins, and the teacher of each update is the snapshot that is due."""
    with ExitStack() as stack:
        made, critic, student = Made(stack, folder), {}, {}
        for update in range(made.plan.updates):
            critic[update], student[update] = made.factors("critic"), made.factors("student")
            made.trainer.step(update)
            if 7 <= update < 12:  # 0.7 of 6 updates, two snapshots: three each
                number = 2 if update < 10 else 1
                held, file = made.factors(DEGRADED), read_tensors(folder / "degradation" / f"{number:03d}.safetensors")
                assert held.keys() == file.keys() and all(torch.equal(held[name], file[name]) for name in file)
    for number, update in ((1, 5), (2, 7)):
        file = read_tensors(folder / "degradation" / f"{number:03d}.safetensors")
        assert all(torch.equal(value, critic[update][name]) for name, value in file.items())
    assert any(not torch.equal(critic[5][name], critic[7][name]) for name in critic[5])
    # while the critic learns alone the student stands still
    assert all(torch.equal(student[3][name], student[7][name]) for name in student[3])
    assert len([*(folder / "degradation").iterdir()]) == 2


def test_the_snapshots_are_of_the_critic(tmp_path: Path) -> None:
    check_files(tmp_path)


def test_a_file_that_is_gone_is_told_of(tmp_path: Path) -> None:
    with ExitStack() as stack:
        made = Made(stack, tmp_path)
        for update in range(8):
            made.trainer.step(update)
        (tmp_path / "degradation" / "001.safetensors").unlink()
        with pytest.raises(OneStepError, match=r"snapshot .*001.safetensors is gone.*existing=restart"):
            for update in range(8, 12):
                made.trainer.step(update)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"critic_warm_up": 1}, "2 snapshots of the critic cannot be taken in critic_warm_up 1"),
        ({"critic_start": "donor"}, "critic_start donor begins elsewhere: set critic_start to base"),
    ],
)
def test_a_way_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(OneStepError, match=words):
        small(**TOLD | changes)
    small(**TOLD | {"critic_warm_up": 1, "backtrack": 0.0})


@pytest.mark.parametrize("changes", [{"critic_warm_up": 0}, {"backtrack": 0.0}, {}], ids=str)
def test_a_run_says_where_it_is_dmd(changes: dict[str, Any]) -> None:
    settings = small(**TOLD | changes)
    assert ("disback is dmd" in METHODS["disback"].note(settings)) is bool(changes)
    assert (disback(settings, 0.0).teacher == DEGRADED) is not bool(changes)


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", narrowed(["epsilon", "v_prediction", "flow"], "flow"))
def test_without_a_way_back_it_is_dmd(prediction: str, tmp_path: Path) -> None:
    """To the bit; with one it is not."""
    few = {"critic_warm_up": 4, "steps": 4}
    found = {
        name: factors(run(tmp_path / name, small(**told, **few), host=SmallHost(prediction)).path)
        for name, told in (
            ("dmd", {"method": "dmd"}),
            ("none", {"method": "disback", "backtrack": 0.0}),
            ("back", {"method": "disback", "snapshots": 2}),
        )
    }
    assert found["dmd"] == found["none"] != found["back"]


POLLS = (14, 22, 25, 28, 34)


@pytest.mark.parametrize("poll", narrowed(POLLS, 25))
def test_a_run_that_is_stopped_ends_as_if_not(poll: int, tmp_path: Path) -> None:
    """In the critic's own updates, as a snapshot is taken, between the turns of the first matching update, on the way
    back: its snapshots too, to the bit."""
    settings = small(**TOLD, save_every=3)
    folder, whole = tmp_path / "cut" / "run", tmp_path / "whole" / "run"
    run(whole, settings)
    with pytest.raises(Cancelled):
        run(folder, settings, host=SmallHost(on_poll=at_call(poll, Cancelled())))
    run(folder, settings, existing="continue")
    assert left(folder) == left(whole)
    for number in (1, 2):
        one, other = (at / "degradation" / f"{number:03d}.safetensors" for at in (folder, whole))
        assert one.read_bytes() == other.read_bytes()


def test_a_state_holds_no_snapshot(tmp_path: Path) -> None:
    run(tmp_path, small(**TOLD))
    states = sorted(tmp_path.glob("state-*/state.safetensors"))
    assert states and not any(DEGRADED in name for name in read_tensors(states[-1]))


# -- mutants ----------------------------------------------------------------------------------------------------------

WAY_MUTANTS = {
    "from the first on": ("self.count - int(along", "1 + int(along"),
    "too early": ("self.first + n * self.updates // self.count), 0)", "self.first + n), 0)"),
    "never the base": ("return 0\n        return max", "return 1\n        return max"),
    "from the run's start": ("update - self.first - self.updates)", "update - self.first)"),
}


@pytest.mark.parametrize("change", WAY_MUTANTS.values(), ids=list(WAY_MUTANTS))
def test_a_wrong_way_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = mutant("onestep.training.methods.degradation", *change, monkeypatch)
    must_fail(lambda wrong: check_way(wrong, tmp_path), module)


FILE_MUTANTS = {
    "the student's factors": ("self.roles.state(CRITIC)", 'self.roles.state("student")'),
    "after the first turn too": ("not first_turn or self._taken == number or", ""),
    "never held": ("self.hold(self.at(update))", "self.hold(0)"),
    "read and not taken": ("value.copy_(kept[name])", "kept[name]"),
}


@pytest.mark.parametrize("change", FILE_MUTANTS.values(), ids=list(FILE_MUTANTS))
def test_a_wrong_file_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = mutant("onestep.training.methods.degradation", *change, monkeypatch)
    monkeypatch.setattr("onestep.training.methods.disback.Degradation", module.Degradation)
    must_fail(lambda wrong: check_files(tmp_path), module)
