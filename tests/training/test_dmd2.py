"""DMD2: dmd and the discriminator's term, its ramp, its real pictures; whole runs that are stopped and go on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import narrowed
from small_host import SmallHost, setup_of, small
from torch import Tensor
from whole_runs import cancelled_and_whole, factors, newest, run

from onestep.core.errors import OneStepError
from onestep.core.tensor_file import read_tensors
from onestep.training.engine.student import add_student
from onestep.training.engine.turns import Plan
from onestep.training.methods import METHODS, settings_for
from onestep.training.methods.alternating import Turns
from onestep.training.methods.discriminator import HEAD

PREDICTIONS = ["epsilon", "v_prediction", "flow"]


def planned(folder: Path, prediction: str = "epsilon", **changes: Any) -> tuple[Any, Plan]:
    """A host with the roles of a run, and its plan."""
    settings = small(method="dmd2", **changes)
    host = SmallHost(prediction)
    host.denoiser.roles.install()
    setup = setup_of(host, settings, folder)
    add_student(host, settings, None)
    with torch.no_grad():
        for _, b in host.denoiser.roles.state("student").values():
            b.add_(0.1 * torch.randn(b.shape, generator=torch.Generator().manual_seed(2)))
    return host, METHODS[settings.method].plan(setup)


def turns_of(plan: Plan) -> Turns:
    found = plan.phases[-1].turns[-1].loss.__self__  # type: ignore[attr-defined]
    assert isinstance(found, Turns)
    return found


def learnt(host: Any, turns: Turns, batch: Any, update: int) -> list[Tensor]:
    """The student's gradients in a turn."""
    for factor in host.denoiser.roles.parameters("student"):
        factor.grad = None
    turns.match(batch, 1.0, update)
    return [factor.grad.clone() for factor in host.denoiser.roles.parameters("student")]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_student_is_told_what_dmd_tells_it_and_the_discriminators_term(prediction: str, tmp_path: Path) -> None:
    """At weight 0 the gradients are dmd's to the bit; else they are these and w times those of the term."""
    found: dict[float, list[Tensor]] = {}
    for weight in (0.0, 0.5, 1.5):
        host, plan = planned(tmp_path / str(weight), prediction, gan_weight=weight, gan_start=0.0, gan_ramp=0.0)
        turns = turns_of(plan)
        assert turns.head is not None
        torch.nn.init.normal_(turns.head.discriminator.head.leave[0].weight, generator=seeded())  # type: ignore[attr-defined]
        batch = turns.setup.prompts.batch(40, range(4))
        found[weight] = learnt(host, turns, batch, turns.first)
    told, _ = turns.head.discriminator.cotangent(host.denoiser, batch, turns.simulate(batch).x0)
    for factor in host.denoiser.roles.parameters("student"):
        factor.grad = None
    turns.simulate(batch).x0.backward(told / 4)
    alone = [factor.grad for factor in host.denoiser.roles.parameters("student")]
    assert max(float(term.abs().max()) for term in alone if term is not None) > 1e-3
    for none, half, most, term in zip(*found.values(), alone, strict=True):
        torch.testing.assert_close(half - none, 0.5 * term, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(most - none, 1.5 * term, rtol=1e-3, atol=1e-5)
    plain = learnt(host, replace(turns, head=None), batch, turns.first)
    assert all(torch.equal(one, other) for one, other in zip(found[0.0], plain, strict=True))
    host.denoiser.roles.remove()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(9)


def test_the_term_ramps_in_late(tmp_path: Path) -> None:
    """0 for half of the updates, then along a line to its weight; the first update asks for it, for nothing."""
    host, plan = planned(tmp_path, steps=40, gan_weight=0.8)
    head = turns_of(plan).head
    assert head is not None
    weights = [head.weight(index) for index in range(40)]
    assert weights[:21] == [0.0] * 21 and weights[30:] == [0.8] * 10
    assert weights[25] == pytest.approx(0.4) and weights[21] == pytest.approx(0.08)
    batch = turns_of(plan).setup.prompts.batch(0, range(4))
    x, asked = batch.normal("x"), []
    for index in range(40):
        found, numbers = head.pull(batch, x, index)
        asked.append(bool(numbers))
        assert (found is None) == (weights[index] == 0)
    assert asked == [True] + [False] * 20 + [True] * 19
    assert head.asked == pytest.approx(sum(asked) / 40) and plan.phases[-1].rare["discriminator's term"] == head.asked


@pytest.mark.parametrize(
    ("told", "asked"),
    [
        ({"gan_start": 0.25, "gan_ramp": 0.0}, [0, *range(10, 40)]),
        ({"gan_start": 0.0, "gan_ramp": 0.5}, range(40)),
        ({"gan_start": 0.0, "gan_ramp": 0.0}, range(40)),
        ({"gan_start": 1.0, "gan_ramp": 0.0}, [0]),
        ({"gan_weight": 0.0}, []),
    ],
)
def test_what_is_asked_is_what_is_counted(told: dict[str, Any], asked: Any, tmp_path: Path) -> None:
    host, plan = planned(tmp_path, steps=40, **told)
    head = turns_of(plan).head
    assert head is not None
    batch = turns_of(plan).setup.prompts.batch(0, range(1))
    found = [index for index in range(40) if head.pull(batch, batch.normal("x"), index)[1]]
    assert found == list(asked) and head.asked == pytest.approx(len(found) / 40)


def test_the_real_pictures_are_the_teachers_of_the_same_prompts(tmp_path: Path) -> None:
    """From the pool of the pairs; the student's beside them are of the same conditions."""
    host, plan = planned(tmp_path, steps=4)
    turns, seen = turns_of(plan), []
    head = turns.head
    assert head is not None

    class Judge:
        def head_loss(self, denoise: Any, batch: Any, real: Tensor, fake: Tensor) -> Any:
            seen.append((batch, real, fake))
            return torch.zeros((), requires_grad=True), {}

    batch = turns.setup.prompts.batch(7, range(4))
    replace(head, discriminator=Judge()).teach(batch, 1.0, 6)  # type: ignore[arg-type]
    wanted, real = head.real.draw(batch, 6)
    assert torch.equal(seen[0][1], real) and torch.equal(seen[0][0].cond.text, wanted.cond.text)
    assert torch.equal(seen[0][2], turns.simulate(wanted).x0) and not seen[0][2].requires_grad
    assert len(list((tmp_path / "pairs").iterdir())) >= 1


@pytest.mark.parametrize("prediction", narrowed(PREDICTIONS, "flow"))
def test_a_head_learns_to_tell_real_from_fake(prediction: str, tmp_path: Path) -> None:
    """Against a student that stays as it is: from 2 log 2 down, real above fake."""
    settings = small(method="dmd2").with_(
        **{"steps": 1, "warm_start": 0, "critic_warm_up": 60, "head_learning_rate": 3e-2, "learning_rate": 0.0}
    )
    made = run(tmp_path / "run", settings, host=SmallHost(prediction))
    numbers = [line for line in made.metrics if "head" in line]
    assert numbers[0]["head"] == pytest.approx(2 * math.log(2))
    last = numbers[-10:]
    assert sum(line["head"] for line in last) / 10 < 1.3
    assert sum(line["head_real"] - line["head_fake"] for line in last) > 0


@pytest.mark.parametrize("poll", narrowed([14, 23, 31], 23))
def test_a_run_that_is_stopped_ends_as_if_not(poll: int, tmp_path: Path) -> None:
    settings = small(method="dmd2", gan_start=0.3, gan_ramp=0.3, gan_weight=1.0, head_updates=2, anchor=0.5)
    cut, whole = cancelled_and_whole(tmp_path, settings, poll)
    assert whole["files"] == cut["files"] and whole["metrics"] == cut["metrics"]


def test_the_head_is_in_the_states_and_in_no_file_of_the_result(tmp_path: Path) -> None:
    host = SmallHost()
    made = run(tmp_path / "run", small(method="dmd2", gan_start=0.0, gan_ramp=0.0), host=host)
    state = read_tensors(newest(tmp_path / "run") / "state.safetensors")
    assert state["head/enter.0.weight"].shape == (256, 8, 3, 3) and bool(state["head/leave.0.weight"].any())
    assert any(name.startswith("head.") for name in state)
    plain = run(tmp_path / "dmd", small())
    assert read_tensors(made.path).keys() == read_tensors(plain.path).keys()
    assert factors(made.path) != factors(plain.path)
    assert HEAD not in host.denoiser.roles.names() and HEAD not in host.denoiser.roles.modules


def test_shared_pictures_go_on_where_a_head_learns_as_well(tmp_path: Path) -> None:
    """Of an update's turns the critic's alone share: the first of them made the pictures."""
    told = {"critic_pictures": "shared", "head_updates": 2, "critic_updates": 3}
    host, plan = planned(tmp_path, **told)
    turns = turns_of(plan)
    for number in range(3):
        batch = turns.setup.prompts.batch(9 * plan.turns + number, range(4))
        assert plan.turns == 6 and turns._shared(batch)[0].step == 9 * plan.turns
    assert len(turns._kept) == 1


def test_what_it_cannot_do_is_refused() -> None:
    check, host = METHODS["dmd2"].check, SmallHost()
    check(host, settings_for("dmd2", head_blocks=5))
    with pytest.raises(OneStepError, match=r"head_level_low 0.9 must be below head_level_high 0.5"):
        settings_for("dmd2", head_level_low=0.9, head_level_high=0.5)
    host.blocks = []
    with pytest.raises(OneStepError, match="no blocks .* could look at: choose a method without a head"):
        check(host, settings_for("dmd2"))
