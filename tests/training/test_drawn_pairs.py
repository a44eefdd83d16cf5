"""Pairs that a run draws and ranks itself, as pso learns of them: which is better, the gradient, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from doubled import PREDICTIONS, Doubled
from mutations import must_fail, mutant
from own_pictures import pairs_in
from small_host import SmallHost, small
from torch import Tensor
from torch.nn.functional import logsigmoid
from whole_runs import cancelled_and_whole, run

from onestep.core.errors import OneStepError
from onestep.core.sampling import sample
from onestep.training.methods import METHODS, drawn_pairs, rewards
from onestep.training.methods import pso as method

BETA = 0.5


def red(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """Without a gradient, as a person's own may be."""
    return torch.tensor([float(value) for value in pictures[:, 0].mean((1, 2))])


def own(**changes: Any) -> Any:
    return small(**{"method": "pso", "student_steps": 2, "drawn": "few", "reward": "contrast", **changes})


def made_of(folder: Path, prediction: str, pso: Any = method, drawn: Any = drawn_pairs, times: float = 2.0) -> Any:
    """(a run's parts in float64, the turns of its updates)."""
    made = Doubled(folder, prediction, method="pso", drawn="few", student_steps=2, reward="contrast", beta=BETA)
    rank = rewards.Ranked(made.setup, [("red", times, red)])
    simulate = pso.pairs_of(made.setup).drawn.simulate
    pairs = pso.FromStudent(drawn.DrawnPairs(simulate, rank))
    return made, pso.PairTurns(made.setup, pairs, pso.preference(made.setup), None)


@torch.no_grad()
def pair_of(made: Doubled, batch: Any) -> tuple[Tensor, Tensor]:
    """(better, worse) in so many words: whole pictures, by the sampler."""

    def whole(name: str) -> Tensor:
        noise = batch.normal(f"{name}latent")
        with made.roles.use("student", train=False):
            return sample(
                made.denoise, made.setup.recipe, batch.cond, noise, lambda at: batch.normal(f"{name}renoise {at}")
            )

    both = whole(""), whole("second ")
    values = [red(made.host.decode(x), []) for x in both]
    first = (values[0] >= values[1])[:, None, None, None]
    assert bool((values[0] != values[1]).all()) and 0 < int(first.sum()) < 4
    return torch.where(first, *both), torch.where(first, *both[::-1])


def in_words(made: Doubled, batch: Any, better: Tensor, worse: Tensor) -> tuple[Tensor, Tensor]:
    """(m [B], the loss with its graph)."""
    schedule = made.denoise.schedule
    levels = made.setup.recipe.levels(schedule)
    sigma = levels[batch.choice(len(levels), "pair's level")].double().expand(4)
    alpha, noise, left = float(schedule.alpha(sigma)[0]), batch.normal("pair's noise"), {}
    weight = alpha**2 / float(sigma[0]) ** 2 + 1
    for side, x in (("w", better), ("l", worse)):
        for role in ("student", "teacher"):
            answer = made.answer(role, alpha * x + float(sigma[0]) * noise, sigma, batch.cond)
            left[role, side] = weight * (answer - x).square().mean((1, 2, 3))
    m = BETA * (left["teacher", "w"] - left["student", "w"] - (left["teacher", "l"] - left["student", "l"]))
    return m, -logsigmoid(m.clamp_max(3.0)).mean() * better[0].numel() / BETA


def check_gradient(folder: Path, prediction: str, **modules: Any) -> None:
    """Of one update: that of the equation, which is that of finite differences."""
    made, turns = made_of(folder, prediction, **modules)
    batch, factors = made.batch(), made.roles.parameters("student")
    with made.hooked(False):
        numbers = turns.prefer_better(batch, 1.0, 0)
        found = [factor.grad.clone() for factor in factors]
        pair = pair_of(made, batch)
        m, value = in_words(made, batch, *pair)
        assert float(m.detach().abs().min()) > 1e-6
        assert float(numbers["margin"]) == pytest.approx(float(m.detach().mean()), rel=1e-6)
        assert float(numbers["pairs"]) == 1
        for mine, theirs in zip(found, torch.autograd.grad(value, factors), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8 * float(theirs.abs().max() + 1e-9))
        steps = [torch.randn(f.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for f in factors]
        ends = []
        for sign in (1e-5, -2e-5):
            for factor, step in zip(factors, steps, strict=True):
                factor.detach().add_(sign * step)
            ends.append(float(in_words(made, batch, *pair)[1].detach()))
    slope = sum(float((grad * step).sum()) for grad, step in zip(found, steps, strict=True))
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_gradient_of_an_update(prediction: str, tmp_path: Path) -> None:
    check_gradient(tmp_path, prediction)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_opposite_reward_teaches_the_opposite(prediction: str, tmp_path: Path) -> None:
    """Where the student is what it was, each margin is 0."""
    found = []
    for times in (2.0, -2.0):
        made, turns = made_of(tmp_path / str(times), prediction, times=times)
        for _, b in made.roles.state("student").values():
            b.zero_()
        with made.hooked(False):
            assert float(turns.prefer_better(made.batch(), 1.0, 0)["margin"]) == 0
        found.append(torch.cat([factor.grad.flatten() for factor in made.roles.parameters("student")]))
    assert float(found[0].abs().max()) > 1e-4
    torch.testing.assert_close(found[0], -found[1], rtol=1e-8, atol=1e-12)


def check_alike(folder: Path, prediction: str, pso: Any = method) -> None:
    made, turns = made_of(folder, prediction, pso)
    none = rewards.Ranked(made.setup, [("none", 1.0, lambda p, t: p.new_zeros(len(p)))])
    turns = replace(turns, pairs=pso.FromStudent(replace(turns.pairs.drawn, rank=none)))
    with made.hooked(False):
        numbers = turns.prefer_better(made.batch(), 1.0, 0)
    assert not any(bool(factor.grad.any()) for factor in made.roles.parameters("student"))
    assert float(numbers["pairs"]) == float(numbers["told_apart"]) == 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_two_that_are_alike_teach_nothing(prediction: str, tmp_path: Path) -> None:
    check_alike(tmp_path, prediction)


MUTANTS = {
    "the worst first": ("drawn", "first, told_apart = mine >= theirs", "first, told_apart = mine <= theirs"),
    "one picture twice": ("drawn", "picked(~first, one, other)", "picked(first, one, other)"),
    "unfinished pictures": ("pso", "only=setup.recipe.steps - 1", "only=0"),
    "better and worse exchanged": ("pso", "pair.better.x0, pair.worse.x0", "pair.worse.x0, pair.better.x0"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_pair_is_found_out(
    change: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"drawn": "drawn_pairs", "pso": "pso"}[change[0]]
    module = mutant(f"onestep.training.methods.{name}", *change[1:], monkeypatch)
    must_fail(lambda wrong: check_gradient(tmp_path, "epsilon", **{change[0]: wrong}), module)


def test_alike_ones_that_teach_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.pso", " * differ\n", "\n", monkeypatch)
    must_fail(lambda wrong: check_alike(tmp_path, "epsilon", wrong), module)


# -- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_of_its_own_pairs(tmp_path: Path) -> None:
    with rewards.given({"mine": red}):
        made = run(tmp_path / "run", own(reward="mine", keep=0.5, steps=6))
    lines = [line for line in made.metrics if line["update"]]
    assert lines[0]["margin"] == pytest.approx(0, abs=1e-5) and lines[0]["pairs"] == 1
    assert {"kept", "told_apart", "reward_gap", "reward_mine", "preference"} <= lines[-1].keys()
    assert made.metrics[0]["distance"] == pytest.approx(0, abs=1e-6)
    nothing = rewards.given({"mine": lambda pictures, prompts: red(pictures, prompts) / 0 * 0})
    with nothing, pytest.raises(OneStepError, match="the reward 'mine' gave nan for a picture of"):
        run(tmp_path / "nan", own(reward="mine"))


@pytest.mark.broad
@pytest.mark.parametrize("poll", [7, 12])
def test_a_run_that_is_stopped_ends_as_if_not(poll: int, tmp_path: Path) -> None:
    with rewards.given({"mine": red}):
        cut, whole = cancelled_and_whole(tmp_path, own(reward="mine"), poll)
    assert cut == whole


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    pairs = pairs_in(tmp_path / "own")
    METHODS["pso"].check_all(SmallHost(), own(), False)
    for changes, match in (
        (pairs, "and reward is 'contrast': pairs are of the folder or of the run's own drawing"),
        ({"reward": "mine"}, "reward names 'mine'"),
        ({"reward": ""}, "both pictures and reward are empty"),
        ({"drawn": "many"}, "a run draws its pairs in up to 8 steps without guidance"),
    ):
        with pytest.raises(OneStepError, match=match):
            METHODS["pso"].check_all(SmallHost(), own(**changes), False)
