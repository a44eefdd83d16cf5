"""The critic's weights over levels, its following of the student, and pictures and anchors that are not made anew each
time."""

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
from narrowed import narrowed, thinned
from oracles import CASES, At, Case, World, drawn, rows
from small_host import SmallHost, setup_of, small
from whole_runs import Cancelled, at_call, left, run

from onestep.training.engine import levels
from onestep.training.engine.student import add_student, generate
from onestep.training.engine.trainer import Trainer
from onestep.training.engine.turns import learning
from onestep.training.methods import METHODS
from onestep.training.methods.alternating import ANCHOR, PICTURE
from onestep.training.methods.distribution_matching import DistributionMatching
from onestep.training.methods.dmd import dmd

BOUNDED = [case for case in CASES if case.alpha > 0]


# -- what the error is an error of ------------------------------------------------------------------------------------


def error_of(name: str, alpha: float, sigma: float, x_s: Any, noise: Any, d: Any, x: Any) -> Any:
    """The error of a prediction whose x0 is ``d``, written from what the prediction is."""
    eps = (x_s - alpha * d) / sigma
    if name == "eps":
        return eps - noise
    if name == "v":
        # alpha eps - sigma x0, of the same picture on a variance-preserving schedule
        norm = np.sqrt(alpha**2 + sigma**2)
        return (alpha * (eps - noise) - sigma * (d - x)) / norm
    if name == "flow":
        # noise - x0 of the flow model at the same signal-to-noise ratio
        return (eps - noise) - (d - x)
    return d - x


def check_weight(module: ModuleType, case: Case, name: str) -> None:
    """The critic's loss with a weight is the mean squared error of that prediction."""
    world, x = World(case), drawn()
    objective = DistributionMatching(critic_levels=At(case.sigma), critic_weight=module.WEIGHTS[name])
    loss = float(objective.critic_loss(world.denoise, world.batch(), x).detach())
    noise, alpha, sigma = rows(world.batch().normal("critic noise")), case.alpha, case.sigma
    x_s = alpha * rows(x) + sigma * noise
    d = world.x0("critic", x_s, world.cond)
    if name == "min-snr":
        wanted = min(alpha**2 / sigma**2, 5.0) * ((d - rows(x)) ** 2).mean()
    else:
        wanted = (error_of(name, alpha, sigma, x_s, noise, d, rows(x)) ** 2).mean()
    assert loss == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("case", BOUNDED, ids=str)
@pytest.mark.parametrize("name", ["v", "eps", "flow", "x0", "min-snr"])
def test_a_weight_is_the_error_of_its_prediction(case: Case, name: str) -> None:
    check_weight(levels, case, name)


def test_min_snr_has_its_ceiling() -> None:
    lam = torch.tensor([-torch.inf, -1.0, 0.5, 2.0, 9.0], dtype=torch.float64)
    np.testing.assert_allclose(levels.min_snr_weight(lam), np.minimum(np.exp(2 * lam.numpy()), 5))


def test_weights_are_finite_at_pure_noise() -> None:
    """eps tells nothing of x0 there, and weighs nothing; v and flow weigh 1."""
    nothing = torch.tensor([-torch.inf], dtype=torch.float64)
    found = {name: float(weight(nothing)) for name, weight in levels.WEIGHTS.items()}
    assert found == {"v": 1.0, "eps": 0.0, "flow": 1.0, "x0": 1.0, "min-snr": 0.0}


WEIGHT_MUTANTS = {
    "v": ("return 1 + torch.exp(2 * lam)", "return torch.exp(2 * lam)"),
    "eps": ("return torch.exp(2 * lam)\n", "return torch.exp(lam)\n"),
    "flow": ("return (1 + torch.exp(lam)) ** 2", "return 1 + torch.exp(lam) ** 2"),
    "x0": ("return torch.ones_like(lam)", "return 2 * torch.ones_like(lam)"),
    "min-snr": ("return torch.exp(2 * lam).clamp_max(5)", "return torch.exp(2 * lam).clamp_min(5)"),
}


@pytest.mark.parametrize("name", list(WEIGHT_MUTANTS))
def test_a_wrong_weight_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.engine.levels", *WEIGHT_MUTANTS[name], monkeypatch)
    must_fail(lambda mutated: check_weight(mutated, CASES[4], name), module)


# -- a trainer --------------------------------------------------------------------------------------------------------


class Made:
    """A trainer as a run makes it, within its hooks."""

    def __init__(self, stack: ExitStack, folder: Path, **changes: Any) -> None:
        self.host, settings = SmallHost(), small(**changes)
        setup = setup_of(self.host, settings, folder)
        self.roles = self.host.denoiser.roles
        add_student(self.host, settings, None)
        self.roles.copy("student", "ema")
        self.plan = METHODS[settings.method].plan(setup)
        stack.enter_context(self.roles.installed())
        self.trainer = Trainer(self.host, settings, setup.recipe, setup.prompts, self.plan)
        draw = torch.Generator().manual_seed(5)
        for role in ("student", "critic"):
            for _, b in self.roles.state(role).values():
                b.copy_(0.3 * torch.randn(b.shape, generator=draw))

    def gradients(self, role: str, update: int, number: int = 0) -> list[torch.Tensor]:
        chosen = [turn for turn in self.plan.phases[-1].turns if turn.role == role][0]
        self.trainer.accumulate(chosen, update, number)
        return [p.grad.clone() for p in self.roles.parameters(role) if p.grad is not None]


FIRST = 5
"""The first update of the matching in `small`: after 3 of the warm start and 2 of the critic alone."""


def test_the_mean_over_elements_is_the_sum_over_their_number(tmp_path: Path) -> None:
    """The matching and the anchor beside it alike, so that what clipping meets has one size for all pictures."""
    found = {}
    for scale in ("sum", "mean"):
        with ExitStack() as stack:
            made = Made(stack, tmp_path / scale, matching_scale=scale, anchor=0.5)
            found[scale] = made.gradients("student", FIRST)
    for whole, mean in zip(found["sum"], found["mean"], strict=True):
        torch.testing.assert_close(mean, whole / (2 * 4 * 4), rtol=1e-4, atol=1e-7)


def test_the_anchor_every_third_time_has_three_times_the_weight(tmp_path: Path) -> None:
    """And takes the pairs in their order: that of update 6 of the matching is the third that it takes."""
    found = {}
    for anchor, every in ((0.0, 1), (0.5, 1), (0.5, 3)):
        with ExitStack() as stack:
            made = Made(stack, tmp_path / f"{anchor} {every}", anchor=anchor, anchor_every=every, pairs=64)
            found[anchor, every] = [made.gradients("student", FIRST + index) for index in range(4)]
    none, each, third = found[0.0, 1], found[0.5, 1], found[0.5, 3]
    for index in range(4):
        for alone, pulled, rare in zip(none[index], each[index], third[index], strict=True):
            wanted = alone + 3 * (pulled - alone) if index == 0 else alone
            if index < 3:
                torch.testing.assert_close(rare, wanted, rtol=1e-3, atol=1e-4)
    assert any(not torch.allclose(a, b) for a, b in zip(none[3], third[3], strict=True))


@pytest.mark.parametrize("after", ["student", "critic"])
def test_the_critic_follows_after_whose_update_it_is_told(after: str, tmp_path: Path) -> None:
    """theta_F <- (1 - s) theta_F + s theta, of every factor, and at no other time."""
    with ExitStack() as stack:
        made = Made(stack, tmp_path, follow=0.25, follow_after=after)
        for turn in made.plan.phases[-1].turns:
            before = {role: [p.detach().clone() for p in made.roles.parameters(role)] for role in ("student", "critic")}
            turn.then()
            share = 0.25 if turn.role == after else 0.0
            for now, f, s in zip(made.roles.parameters("critic"), before["critic"], before["student"], strict=True):
                torch.testing.assert_close(now.detach(), (1 - share) * f + share * s)
            assert all(
                torch.equal(p, b) for p, b in zip(made.roles.parameters("student"), before["student"], strict=True)
            )


def test_a_critic_that_is_the_student_stays_it(tmp_path: Path) -> None:
    with ExitStack() as stack:
        made = Made(stack, tmp_path, follow=0.25)
        made.roles.copy("student", "critic")
        made.plan.phases[-1].turns[-1].then()
        for mine, theirs in zip(made.roles.parameters("critic"), made.roles.parameters("student"), strict=True):
            torch.testing.assert_close(mine, theirs)


# -- one picture for several turns ------------------------------------------------------------------------------------


def forwards(made: Made, update: int) -> list[tuple[int, bool]]:
    """(rows, with a graph) of each network forward in an update."""
    seen: list[tuple[int, bool]] = []
    hook = made.host.network.register_forward_pre_hook(
        lambda module, args: seen.append((len(args[0]), torch.is_grad_enabled()))
    )
    made.trainer.step(update)
    hook.remove()
    return seen


PICTURES = [("fresh", 1), ("shared", 1), ("shared", 2), ("fresh", 3)]
GUIDED = [(1.0, False), (2.0, False), (2.0, True)]


@pytest.mark.parametrize(("steps", "anchor", "shown", "guided"), thinned(7, [1, 2], [0.0, 0.5], PICTURES, GUIDED))
def test_the_plan_counts_the_forwards_that_are_made(
    tmp_path: Path, steps: int, anchor: float, shown: tuple[str, int], guided: tuple[float, bool]
) -> None:
    """Over the updates of the matching: rows without a graph are a forward each, rows with one are learnt from."""
    (pictures, every), (k, apart) = shown, guided
    options = {"critic_updates": 3, "student_steps": steps, "steps": 6, "pairs": 4, "critic_pictures": pictures}
    options |= {"anchor": anchor, "anchor_every": every, "matching_guidance": k, "separate_levels": apart}
    with ExitStack() as stack:
        made = Made(stack, tmp_path, **options)
        made.trainer.step(0)  # the pairs' one block is made
        seen = [one for update in range(FIRST, FIRST + 6) for one in forwards(made, update)]
        told = learning(made.trainer.settings)
    drawn_steps = sum(rows_ for rows_, graph in seen if not graph) / 4
    learnt = sum(rows_ for rows_, graph in seen if graph) / 4
    counted = made.plan.phases[-1].cost * 6
    if steps == 1:
        assert counted == pytest.approx(drawn_steps + told * learnt)
    else:  # which of two steps is drawn: half a forward more for each picture, in the mean
        pictures_drawn = 6 * (2 if pictures == "shared" else 4)
        assert counted == pytest.approx(drawn_steps + told * learnt, abs=pictures_drawn / 2)
    assert made.plan.phases[-1].rare == {ANCHOR: 1 / every, PICTURE: 1 / 3}


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_what_is_beside_the_matching_is_counted_too(off: float, tmp_path: Path) -> None:
    """Of two steps the second alone is matched where the first is anchored: so nothing of it is a mean."""
    told = {"student_steps": 2, "diversity_anchor": 0.1, "diversity_steps": 2, "pairs": 4, "steps": 4}
    with ExitStack() as stack:
        made = Made(stack, tmp_path, method="cdm", student_schedule="fixed", off_trajectory=off, **told)
        made.trainer.step(0)
        first = forwards(made, FIRST)  # the block of anchors is made: two guided steps of four samples
        seen = [one for update in range(FIRST + 1, FIRST + 4) for one in forwards(made, update)]
        learn = learning(made.trainer.settings)
    without, graph = (sum(count for count, learnt in seen if learnt is kind) / 4 / 3 for kind in (False, True))
    phase = made.plan.phases[-1]
    assert phase.cost == pytest.approx(without + learn * graph)
    assert (phase.fresh, phase.fresh_cost) == (FIRST + 1, 4.0)
    made_then = sum(count for count, learnt in first if not learnt) / 4 - without
    assert made_then == phase.fresh_cost


def test_shared_pictures_meet_fresh_noise_and_levels(tmp_path: Path) -> None:
    """Three turns of one update: one picture, and the critic sees it at three levels under three noises."""
    with ExitStack() as stack:
        made = Made(stack, tmp_path, critic_updates=3, critic_pictures="shared", learning_rate=0.0)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        made.host.network.register_forward_pre_hook(
            lambda module, args: seen.append((args[0].detach().clone(), args[1].clone()))
        )
        made.trainer.step(FIRST)
    critic = seen[1:4]
    assert len({tuple(time.tolist()) for _, time in critic}) == 3
    assert all(not torch.equal(critic[0][0], x) for x, _ in critic[1:])


def test_each_turn_of_shared_pictures_is_the_loss_on_the_first_turns_samples(tmp_path: Path) -> None:
    """Critic turn 1 by hand: prompts and picture of turn 0's batch, noise and level of its own."""
    with ExitStack() as stack:
        made = Made(stack, tmp_path, critic_updates=2, critic_pictures="shared")
        found = made.gradients("critic", FIRST, 1)
        prompts = made.trainer.prompts
        first, second = (prompts.batch(FIRST * 3 + number, range(4)) for number in (0, 1))
        with torch.no_grad():
            x = generate(made.host.denoiser, made.trainer.recipe, first)
        batch = replace(second, cond=first.cond)
        loss = dmd(made.trainer.settings).critic_loss(made.host.denoiser, batch, x)
        wanted = torch.autograd.grad(loss, made.roles.parameters("critic"))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


CYCLE = {
    "critic_pictures": "shared",
    "anchor_every": 2,
    "anchor": 0.5,
    "follow": 0.1,
    "follow_after": "critic",
    "matching_scale": "mean",
    "critic_weight": "eps",
    "guidance_schedule": "falling",
    "level_high_end": 0.5,
    "normaliser_floor": 0.05,
    "guidance_rescale": 0.5,
}


POLLS = [(method, poll) for method in ("dmd", "pg-sb") for poll in (18, 24, 31)]


@pytest.mark.parametrize(("method", "poll"), narrowed(POLLS, ("dmd", 24), ("pg-sb", 31)))
def test_a_run_that_is_stopped_between_two_critic_turns_ends_as_if_not(method: str, poll: int, tmp_path: Path) -> None:
    """Every new switch on; cancelled wherever a poll is, also between turns that share a picture."""
    changes = dict(CYCLE) if method == "dmd" else {**CYCLE, "guidance_schedule": "random", "guidance_end": 4.0}
    settings = small(method=method, **changes)
    run(tmp_path / "whole" / "run", settings)
    host = SmallHost(on_poll=at_call(poll, Cancelled()))
    with pytest.raises(Cancelled):
        run(tmp_path / "cut" / "run", settings, host=host)
    run(tmp_path / "cut" / "run", settings, existing="continue")
    whole, cut = left(tmp_path / "whole" / "run"), left(tmp_path / "cut" / "run")
    assert whole["files"] == cut["files"] and whole["metrics"] == cut["metrics"]
