"""Distillation-DPO: pairs, their ranks, both critics and the student's gradient by the equations, its cap, runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from doubled import ALPHA, PREDICTIONS, SIGMA, Doubled
from mutations import must_fail, mutant
from oracles import At
from small_host import SmallHost, small
from torch import Tensor
from whole_runs import cancelled_and_whole, run

from onestep.core.errors import OneStepError
from onestep.training.methods import METHODS, settings_for
from onestep.training.methods import distillation_dpo as method
from onestep.training.methods import rewards as engine

GUIDANCE, BETA = 2.5, 0.02


def red(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """Without a gradient, as a person's own may be."""
    return torch.tensor([float(value) for value in pictures[:, 0].mean((1, 2))])


def made_of(folder: Path, prediction: str, module: Any = method, **told: Any) -> tuple[Doubled, Any]:
    told = {"matching_guidance": GUIDANCE, "beta": BETA, **told}
    made = Doubled(folder, prediction, method="distillation-dpo", **told)
    turns: Any = made.turns
    objective = replace(turns.objective, levels=At(SIGMA), critic_levels=At(SIGMA))
    rank = engine.Ranked(made.setup, [("red", 2.0, red)])
    return made, module.PairTurns(made.setup, replace(turns.pairs, rank=rank), objective)


def pair_of(made: Doubled, batch: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(the student's x0 with its graph, better and worse), (what they begin at), in so many words."""
    schedule, recipe = made.denoise.schedule, made.setup.recipe
    sigma = recipe.levels(schedule)[0].expand(4)
    starts = [batch.normal(name) * recipe.initial_noise_scale for name in ("latent", "second latent")]
    starts = [start * float(sigma[0]) if float(sigma[0]) > 1 else start for start in starts]
    drawn = [made.answer("student", x, sigma, batch.cond) for x in starts]
    values = [red(made.host.decode(x0.detach()), []) for x0 in drawn]
    first = (values[0] >= values[1])[:, None, None, None]
    assert bool((values[0] != values[1]).all()) and 0 < int(first.sum()) < 4
    better, worse = torch.where(first, *drawn), torch.where(first, *drawn[::-1])
    return (better, worse), (torch.where(first, *starts), torch.where(first, *starts[::-1]))


def in_words(made: Doubled, batch: Any) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(margins, the surrogate loss with its graph, what is held against the pictures), from the equations."""
    own, alpha, sigma = (
        made.setup.settings.own,
        ALPHA[made.host.prediction],
        torch.full((4,), SIGMA, dtype=torch.float64),
    )
    both, _ = pair_of(made, batch)
    pulls, ratios = [], []
    for x, critic in zip(both, ("critic", "critic@2"), strict=True):
        x = x.detach()
        x_s = alpha * x + SIGMA * batch.normal("match noise")
        with torch.no_grad():
            d_c = made.answer("teacher", x_s, sigma, batch.cond)
            d_u = made.answer("teacher", x_s, sigma, batch.nulls())
            made.roles._factors["alone"] = made.roles._factors[critic]
            d_f = made.answer("alone", x_s, sigma, batch.cond)
        guided = d_u + GUIDANCE * (d_c - d_u)
        weight = 1 / (x - guided).abs().mean((1, 2, 3), keepdim=True)
        pulls.append(weight * (d_f - d_c - (GUIDANCE - 1) * (d_c - d_u)))
        errors = [(answer - x).square().mean((1, 2, 3)) for answer in (d_c, d_f)]
        ratios.append((alpha**2 / SIGMA**2 + 1) * (errors[0] - errors[1]))
    m = own.beta * (ratios[1] - ratios[0])
    scale = (2 / (1 + m.exp()) * (m < own.margin_cap))[:, None, None, None]
    held = scale * pulls[0] / 4, -scale * pulls[1] / 4
    return m, (both[0] * held[0]).sum() + (both[1] * held[1]).sum(), held


def check_student(module: ModuleType, folder: Path, prediction: str, **told: Any) -> None:
    """The numbers and the gradient, which is also that of finite differences."""
    made, turns = made_of(folder, prediction, module, **told)
    batch, factors = made.batch(), made.roles.parameters("student")
    with made.hooked(False):
        numbers = turns.match(batch, 1.0, 0)
        found = [factor.grad.clone() for factor in factors]
        m, loss, held = in_words(made, batch)
        wanted = torch.autograd.grad(loss, factors)
        assert float(numbers["margin"]) == pytest.approx(float(m.mean()), rel=1e-9)
        assert float(numbers["told_apart"]) == pytest.approx(float((m > 0).double().mean()))
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9 * float(theirs.abs().max() + 1e-9))
        steps = [torch.randn(f.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for f in factors]
        ends = []
        for sign in (1e-5, -1e-5):
            with torch.no_grad():
                for factor, step in zip(factors, steps, strict=True):
                    factor.add_(sign * step)
                both, _ = pair_of(made, batch)
                ends.append(float((both[0] * held[0]).sum() + (both[1] * held[1]).sum()))
                for factor, step in zip(factors, steps, strict=True):
                    factor.sub_(sign * step)
    slope = sum(float((grad * step).sum()) for grad, step in zip(found, steps, strict=True))
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)
    assert all(f.grad is None for role in ("critic", "critic@2") for f in made.roles._in_order(role))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_students_gradient(prediction: str, tmp_path: Path) -> None:
    check_student(method, tmp_path, prediction)


def beyond(folder: Path, prediction: str) -> dict[str, float]:
    """Settings by which one of the margins is beyond the cap, and the next one is not."""
    made, _ = made_of(folder, prediction)
    with made.hooked(False):
        largest = (in_words(made, made.batch())[0] / BETA).sort().values[2:]
    assert float(largest[1]) > 1.1 * float(largest[0]) and float(largest.mean()) > 0
    return {"margin_cap": 3.0, "beta": 3 / float(largest.mean())}


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_pair_that_is_told_apart_teaches_nothing_more(prediction: str, tmp_path: Path) -> None:
    check_student(method, tmp_path / "capped", prediction, **beyond(tmp_path / "free", prediction))


MUTANTS = {
    "the worse towards the teacher": ("(g_w, -g_l)", "(g_w, g_l)"),
    "one critic": ("with denoise.roles.steps.told(side):", "with denoise.roles.steps.told(0):"),
    "the margin's sign": ("(ratio(worse) - ratio(better))", "(ratio(better) - ratio(worse))"),
    "what is told apart more": ("torch.sigmoid(-margin)", "torch.sigmoid(margin)"),
    "no cap": ("(margin < self.setup.settings.own.margin_cap)", "(margin < 1e9)"),
    "half": ("2 * torch.sigmoid", "1 * torch.sigmoid"),
    "errors of the picture": ("at(v_weight,", "at(WEIGHTS['x0'],"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_formula_is_found_out(change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.distillation_dpo", *change, monkeypatch)
    told = beyond(tmp_path / "free", "epsilon")
    must_fail(lambda wrong: check_student(wrong, tmp_path / "run", "epsilon", **told), module)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_each_critic_learns_of_its_own_pictures(prediction: str, tmp_path: Path) -> None:
    made, turns = made_of(tmp_path, prediction)
    batch, sigma, alpha = made.batch(), torch.full((4,), SIGMA, dtype=torch.float64), ALPHA[prediction]
    with made.hooked(False):
        numbers = turns.teach_critics(batch, 1.0, 0)
        both, losses = pair_of(made, batch)[0], []
        for x, critic in zip(both, ("critic", "critic@2"), strict=True):
            factors = made.roles._in_order(critic)
            found = [factor.grad.clone() for factor in factors]
            made.roles._factors["alone"] = made.roles._factors[critic]
            with made.roles.use("alone"):
                answer = made.denoise(alpha * x.detach() + SIGMA * batch.normal("critic noise"), sigma, batch.cond)
            loss = (alpha**2 / SIGMA**2 + 1) * (answer - x.detach()).square().mean()
            for mine, theirs in zip(found, torch.autograd.grad(loss, factors), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)
            losses.append(float(loss.detach()))
    assert float(numbers["critic"]) == pytest.approx(sum(losses) / 2, rel=1e-9)
    assert all(factor.grad is None for factor in made.roles.parameters("student"))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_teaches_nothing(prediction: str, tmp_path: Path) -> None:
    """Critics that are the teacher, without guidance; and pictures that are alike to the reward."""
    for case in ("agree", "alike"):
        made, turns = made_of(tmp_path / case, prediction, matching_guidance=1.0)
        for critic in ("critic", "critic@2") if case == "agree" else ():
            for _, b in made.roles.state(critic).values():
                b.zero_()
        if case == "alike":
            none = engine.Ranked(made.setup, [("none", 1.0, lambda p, t: p.new_zeros(len(p)))])
            turns = replace(turns, pairs=replace(turns.pairs, rank=none))
        with made.hooked(False):
            numbers = turns.match(made.batch(), 1.0, 0)
        assert max(float(factor.grad.abs().max()) for factor in made.roles.parameters("student")) < 1e-12
        assert float(numbers["pairs"]) == (case == "agree")


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poll", [7, 12])
def test_a_run_that_is_stopped_ends_as_if_not(poll: int, tmp_path: Path) -> None:
    cut, whole = cancelled_and_whole(tmp_path, small(method="distillation-dpo", student_steps=2), poll)
    assert cut == whole


def test_a_persons_own_reward_ranks_without_a_gradient_and_a_bad_one_is_refused(tmp_path: Path) -> None:
    settings = small(method="distillation-dpo", reward="mine, contrast*0.5", watch_every=0, preview_every=0)
    with engine.given({"mine": red}):
        result = run(tmp_path / "good", settings)
    last = result.metrics[-1]
    assert last["pairs"] == 1 and {"margin", "told_apart", "reward_gap", "reward_mine", "critic"} <= {*last}
    for reward, match in (
        (lambda p, t: red(p, t) / 0 * 0, "the reward 'mine' gave nan for a picture of"),
        (lambda p, t: red(p, t)[:1], r"the reward 'mine' gave a tensor \[1\] for 4 pictures"),
    ):
        with engine.given({"mine": reward}), pytest.raises(OneStepError, match=match):
            run(tmp_path / match[-8:], settings)
    with pytest.raises(OneStepError, match="reward names 'mine'"):
        METHODS["distillation-dpo"].check(SmallHost(), settings)
    with pytest.raises(OneStepError, match="has no setting 'warm_start': it belongs to"):
        settings_for("distillation-dpo", warm_start=3)
    assert "begin with a student that draws already" in METHODS["distillation-dpo"].note(settings)
