"""Regression with its detail weighed for itself: what detail is, and the loss in NumPy."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from oracles import CASES, Case, World, drawn, rows
from trajectory_oracle import loss_of

from onestep.core.recipe import Recipe
from onestep.training.methods import hipa as method
from onestep.training.methods.regression import Regression

C = 0.03


def waves(frequency: int, along: str) -> torch.Tensor:
    """One wave of so many periods on 16 x 16 latents, [1, 1, 16, 16]."""
    wave = torch.cos(2 * torch.pi * frequency * torch.arange(16, dtype=torch.float64) / 16)
    return (wave[:, None] if along == "rows" else wave[None]).expand(16, 16)[None, None].clone()


def test_what_detail_is() -> None:
    """Of 16 rows the highest wave has 8 periods: from a half on, those of 4 and more stay, in either direction."""
    for along in ("rows", "columns"):
        for frequency in range(9):
            found = method.detail(waves(frequency, along), 0.5)
            wanted = waves(frequency, along) if frequency >= 4 else torch.zeros(1, 1, 16, 16).double()
            torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    x = drawn(seed=1)
    torch.testing.assert_close(method.detail(x, 0.0), x)
    assert method.detail(x.to(torch.bfloat16), 0.5).dtype == torch.bfloat16


def check(module: ModuleType, case: Case) -> None:
    """Of 2 x 2 latents detail is all but the mean."""
    world = World(case)
    recipe = Recipe.for_student(world.schedule, 1, "unet", ())
    z, target = drawn(seed=1), drawn(seed=2)
    regress = Regression(recipe)
    x0 = regress.answer(world.denoise, world.batch(), (z, target))
    loss = module.WithDetail(regress, 2.0, 0.25)(world.denoise, world.batch(), (z, target))
    error = (rows(x0) - rows(target)).reshape(4, 2, 4)
    high = error - error.mean(2, keepdims=True)
    wanted = sum(weight * (np.sqrt(part**2 + C**2) - C).sum((1, 2)).mean() for weight, part in ((1, error), (2, high)))
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_in_closed_form(case: Case) -> None:
    check(method, case)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_without_its_term_it_is_regression(prediction: str, tmp_path: Path) -> None:
    plain = loss_of("regression", tmp_path, prediction, "regression")
    assert loss_of("hipa", tmp_path, prediction, "regression", detail_weight=0.0) == plain > 0
    assert loss_of("hipa", tmp_path / "with", prediction, "regression") > plain


MUTANTS: dict[str, tuple[str, str]] = {
    "low for high": (">= from_share", "< from_share"),
    "no weight": ("own + self.weight * high", "own + high"),
    "the picture alone": ("(own + self.weight * high)", "own"),
    "of one alone": (
        "detail(x0, self.from_share), detail(pairs[1], self.from_share)",
        "detail(x0, self.from_share), pairs[1]",
    ),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_loss_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.hipa", *change, monkeypatch)
    must_fail(lambda mutated: check(mutated, CASES[2]), module)
