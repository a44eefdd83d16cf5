"""Rewards and DI*: guards and refusals, the pull through a decoder by finite differences, what it adds to sim, runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from doubled import PREDICTIONS, Doubled
from mutations import must_fail, mutant
from narrowed import narrowed
from small_host import SmallHost, small
from torch import Tensor
from whole_runs import Cancelled, at_call, left, run

from onestep.core.errors import OneStepError
from onestep.training.methods import METHODS, settings_for
from onestep.training.methods import di_star as method
from onestep.training.methods import rewards as engine
from onestep.training.methods.sim import sim


def bright(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    return pictures.flatten(1).mean(1)


def long(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """The longer the prompt the more red, the shorter the more blue."""
    red = torch.tensor([len(prompt) / 20 for prompt in prompts]).to(pictures)
    return (red * pictures[:, 0].mean((1, 2)) + (1 - red) * pictures[:, 2].mean((1, 2))).square()


# -- rewards ----------------------------------------------------------------------------------------------------------


def test_the_guards_are_zero_for_usual_pictures_and_fall_beyond() -> None:
    draw = np.random.default_rng(3)
    usual = 0.5 + 0.15 * draw.standard_normal((2, 3, 16, 16))
    burnt = draw.uniform(-0.5, 1.5, (2, 3, 16, 16)) > 0.5
    for pictures in (usual, burnt.astype(float), draw.uniform(-0.5, 1.5, (2, 3, 16, 16))):
        p = torch.from_numpy(pictures)
        chroma = pictures.max(1) - pictures.min(1)
        wanted = -np.square(np.maximum(0, chroma - 0.6)).mean((1, 2))
        np.testing.assert_allclose(engine.saturation(p, []), wanted, atol=1e-12)
        luma = 0.2126 * pictures[:, 0] + 0.7152 * pictures[:, 1] + 0.0722 * pictures[:, 2]
        wanted = -np.square(np.maximum(0, luma.std((1, 2)) - 0.3))
        np.testing.assert_allclose(engine.contrast(p, []), wanted, atol=1e-12)
    assert not engine.contrast(torch.from_numpy(usual), []).any()
    assert float(engine.saturation(torch.from_numpy(usual), []).min()) > -0.01
    assert float(engine.saturation(torch.from_numpy(burnt).double(), []).max()) < -0.05


@pytest.mark.parametrize(
    ("reward", "match"),
    [
        (lambda p, t: p.mean((2, 3)), r"'mine' gave a tensor \[4, 3\] for 4 pictures: it must give a tensor \[4\]"),
        (lambda p, t: p.mean(), r"gave a tensor \[\] for 4 pictures"),
        (lambda p, t: [0.0] * len(p), "gave a list for 4 pictures"),
        (lambda p, t: p.detach().flatten(1).mean(1), "the reward 'mine' has no gradient in the pictures"),
        (lambda p, t: p.flatten(1).mean(1) / 0, "the reward 'mine' gave inf for a picture of 'a cat'"),
        (lambda p, t: p.flatten(1).mean(1) * torch.tensor([1, 1, np.nan, 1]), "gave nan for a picture of 'two'"),
    ],
)  # fmt: skip
def test_what_is_no_reward_is_refused_by_name(reward: Any, match: str) -> None:
    pictures = torch.rand(4, 3, 8, 8, requires_grad=True)
    with pytest.raises(OneStepError, match=match):
        found = engine.valued("mine", reward, pictures, ["a cat", "b", "two", "c"])
        engine.check_numbers({"good": torch.zeros(4), "mine": found}, pictures, ["a cat", "b", "two", "c"])


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    with pytest.raises(OneStepError, match=r"the gradient of the reward .one, two. through the decoder is not finite"):
        engine.check_numbers({"one": torch.ones(2), "two": torch.ones(2)}, torch.tensor([1.0, np.inf]), ["a", "b"])


def test_rewards_by_name() -> None:
    def named(text: str, planned: bool = False) -> Any:
        return engine.rewards_of(settings_for("di-star", reward=text), planned)

    assert engine.told(" saturation, contrast * 0.5 ,") == {"saturation": 1.0, "contrast": 0.5}
    assert named("contrast*2, saturation") == [
        ("contrast", 2.0, engine.contrast),
        ("saturation", 1.0, engine.saturation),
    ]
    with engine.given({"mine": bright}):
        assert named("mine*3, contrast") == [("mine", 3.0, bright), ("contrast", 1.0, engine.contrast)]
        assert named("mine, contrast", planned=True) == [("contrast", 1.0, engine.contrast)]
    for text, match in (
        ("mine", "reward names 'mine'.*one of your own is given to onestep.distill.*rewards={'mine': function}"),
        ("contrst", "reward names 'contrst'; did you mean 'contrast'"),
        (" , ", "reward is empty: name one or several of agreement, saturation, contrast"),
        ("agreement", "the reward agreement is had in Python and on the command line, with the folder of a CLIP"),
        ("contrast*much", "write a number behind the star, as in contrast"),
        ("contrast*inf", "write a number behind the star"),
    ):
        with pytest.raises(OneStepError, match=match):
            named(text)
    for wrong in ({"a b": bright}, {"mine": 3}, {"contrast": bright}):
        with pytest.raises(OneStepError, match="rewards has"), engine.given(wrong):  # type: ignore[arg-type]
            pass


# -- the pull ---------------------------------------------------------------------------------------------------------


def pulled(folder: Path, prediction: str = "flow", module: Any = engine, **told: Any) -> tuple[Doubled, Any]:
    made = Doubled(folder, prediction, method="di-star", reward="saturation", **told)
    rewards = [("long", 1.0, long), ("bright", -0.5, bright)]
    return made, module.RewardPull(made.setup, rewards, 7.0)


def check_pull(module: ModuleType, folder: Path) -> None:
    """-lambda d (sum of rewards) / d x by central differences, in float64."""
    made, pull = pulled(folder, module=module)
    batch, x = made.batch(), made.pictures()
    found, numbers = pull(batch, x)
    assert batch.texts and all(any(p == text for p in made.setup.prompts.texts) for text in batch.texts)

    def total(x: Tensor) -> Tensor:
        pictures = made.host.decode(x).double()
        return long(pictures, batch.texts) - 0.5 * bright(pictures, batch.texts)

    for _ in range(5):
        step = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        slope = (total(x + 1e-2 * step) - total(x - 1e-2 * step)) / 2e-2
        np.testing.assert_allclose((found * step).flatten(1).sum(1), -7.0 * slope, rtol=2e-3, atol=1e-4)
    assert float(numbers["reward"]) == pytest.approx(float(total(x).mean()), rel=1e-5)
    assert float(numbers["reward_bright"]) == pytest.approx(float(bright(made.host.decode(x), []).mean()), rel=1e-5)
    assert float(numbers["reward_pull"]) == pytest.approx(float(found.flatten(1).norm(dim=1).mean()))


def test_the_pull_by_finite_differences(tmp_path: Path) -> None:
    check_pull(engine, tmp_path)


MUTANTS = {
    "less of it": ("(-self.weight / SMALL)", "(self.weight / SMALL)"),
    "its scale left": ("(-self.weight / SMALL)", "-self.weight"),
    "one reward alone": ("total = total + times * values[name]", "total = values[name]"),
    "unweighed": ("total = total + times * values[name]", "total = total + values[name]"),
    "a mean over the batch": ("SMALL * total.sum()", "SMALL * total.mean()"),
    "other prompts": ("shown, batch.texts)", "shown, batch.texts[::-1])"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_pull_is_found_out(change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.rewards", *change, monkeypatch)
    must_fail(lambda wrong: check_pull(wrong, tmp_path), module)


class Burning(SmallHost):
    """Its decoder draws far beyond what can be shown."""

    @contextmanager
    def decoding(self) -> Iterator[Any]:
        yield lambda latents: 4 * latents[:, [0, 1, 0]] + 0.5


def test_a_burnt_picture_is_seen_as_shown_and_pulled_back(tmp_path: Path) -> None:
    """Its value is of what is shown, between 0 and 1; its gradient is not lost where that is cut off."""
    made, pull = pulled(tmp_path)
    made.setup = replace(made.setup, host=Burning())
    pull = replace(pull, setup=made.setup, rewards=[("bright", 1.0, bright)])
    x = torch.full((4, 2, 4, 4), 3.0, dtype=torch.float64)
    found, numbers = pull(made.batch(), x)
    assert float(numbers["reward"]) == 1.0 and bool((found < 0).all())


# -- beside the matching ----------------------------------------------------------------------------------------------


def check_beside(module: ModuleType, prediction: str, folder: Path) -> None:
    """Its cotangent is sim's and the pull, to the last places."""
    told = {"matching_guidance": 3.0, "guidance_strategy": "long-short"}
    made, pull = pulled(folder, prediction, **told)
    batch, x = made.batch(), made.pictures()
    objective = module.di_star(made.setup.settings, 0.0, pull)
    plain = sim(settings_for("sim", **told))
    with made.hooked(False):
        found, scores = objective.cotangent(made.denoise, batch, x)
        wanted, _ = plain.cotangent(made.denoise, batch, x)
    np.testing.assert_allclose(found, wanted + pull(batch, x)[0], rtol=1e-9, atol=1e-10)
    assert "reward" in scores.told and objective.backwards == plain.backwards
    assert float((found - wanted).abs().max()) > 1e-4


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_it_is_sim_and_the_pull(prediction: str, tmp_path: Path) -> None:
    check_beside(method, prediction, tmp_path)


def test_wrong_sums_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, change in enumerate(
        (
            ("batch, scores) + pull", "batch, scores) - pull"),
            ("batch, scores) + pull", "batch, scores)"),
            ("self.matching(objective, denoise, batch, scores) + pull", "pull"),
            ("along, 1.0, PseudoHuber", "along, 1.2, PseudoHuber"),
        )
    ):
        module = mutant("onestep.training.methods.di_star", *change, monkeypatch)
        must_fail(lambda wrong, at=number: check_beside(wrong, "flow", tmp_path / f"{at}"), module)  # type: ignore[misc]


# -- whole runs -------------------------------------------------------------------------------------------------------


def rewarded(**changes: Any) -> Any:
    return small(method="di-star", **{"warm_start": 2, "critic_warm_up": 1, "reward": "bright, contrast", **changes})


@pytest.mark.broad
@pytest.mark.parametrize("prediction", narrowed(PREDICTIONS, "flow"))
def test_a_run_has_more_of_it(prediction: str, tmp_path: Path) -> None:
    found = {}
    with engine.given({"bright": bright}):
        for weight in (0.0, 200.0):
            settings = rewarded(steps=24, reward_weight=weight, watch_every=0, preview_every=0)
            made = run(tmp_path / f"{weight}", settings, host=SmallHost(prediction))
            lines = [line for line in made.metrics if "reward" in line]
            assert len(lines) == 24 and all(
                {"reward_bright", "reward_contrast", "reward_pull"} <= line.keys() for line in lines
            )
            found[weight] = np.mean([line["reward_bright"] for line in lines[-4:]])
    assert found[200.0] > found[0.0] + 0.02, found


@pytest.mark.broad
def test_a_run_that_is_stopped_ends_as_if_not(tmp_path: Path) -> None:
    settings = rewarded(student_steps=2)
    with engine.given({"bright": bright}):
        run(tmp_path / "whole" / "run", settings)
        with pytest.raises(Cancelled):
            run(tmp_path / "cut" / "run", settings, host=SmallHost(on_poll=at_call(20, Cancelled())))
    with pytest.raises(OneStepError, match="reward names 'bright'.*each time that the run goes on"):
        run(tmp_path / "cut" / "run", settings, existing="continue")
    with engine.given({"bright": bright}):
        run(tmp_path / "cut" / "run", settings, existing="continue")
    whole, cut = left(tmp_path / "whole" / "run"), left(tmp_path / "cut" / "run")
    assert whole["files"] == cut["files"] and whole["metrics"] == cut["metrics"]


def test_a_reward_that_breaks_down_ends_the_run_by_name(tmp_path: Path) -> None:
    def broken(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        return (pictures.flatten(1).mean(1) - 2).sqrt()

    with engine.given({"broken": broken}), pytest.raises(OneStepError, match="the reward 'broken' gave nan"):
        run(tmp_path / "run", rewarded(reward="broken"))
    assert METHODS["di-star"].settings().reward == "saturation, contrast"
