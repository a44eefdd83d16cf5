"""Score forgetting: the teacher is asked for another thing, in closed form; which prompts name what is forgotten; whole
runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from doubled import ALPHA, PREDICTIONS, SIGMA, Doubled
from mutations import must_fail, mutant
from narrowed import narrowed
from oracles import CASES, At, Case, World
from small_host import PROMPTS, SmallHost, setup_of, small
from whole_runs import cancelled_and_whole, run

from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.training.data.pairs import Pairs, teach
from onestep.training.distil import distil
from onestep.training.engine.student import generate
from onestep.training.methods import METHODS, settings_for
from onestep.training.methods import distribution_matching as engine
from onestep.training.methods import sfd as method
from onestep.training.methods.sid import sid
from onestep.training.watch.measures import Watch

FORGET = {"forget": "bird, birds", "instead": "dogs"}

# -- what the teacher is asked ----------------------------------------------------------------------------------------


def check_gradient(module: ModuleType, prediction: str, strategy: str, folder: Path) -> None:
    """The cotangent is the gradient of the loss in one graph, with R of the other prompt and K of the prompt."""
    told = {"alpha": 1.2, "matching_guidance": 3.0, "guidance_strategy": strategy}
    made = Doubled(folder, prediction, method="sfd", **FORGET, **told)
    batch, x = made.batch(), made.pictures().requires_grad_()
    assert batch.teachers is not None and not torch.equal(batch.teachers.text, batch.cond.text)
    objective = made.turns.objective(made.setup.settings, 0.0)
    objective = module.DistributionMatching(**{**vars(objective), "levels": At(SIGMA)})
    sigma = torch.full((4,), SIGMA, dtype=torch.float64)
    k_f = 3.0 if strategy == "long-short" else 1.0
    with made.hooked(False):
        found, _ = objective.cotangent(made.denoise, batch, x.detach())
        x_s = ALPHA[prediction] * x + SIGMA * batch.normal("match noise")
        real = made.guided("teacher", 3.0, x_s, sigma, replace(batch, cond=batch.teachers))
        fake = made.guided("critic", k_f, x_s, sigma, batch)
        m = (x - real).detach().abs().mean((1, 2, 3), keepdim=True)
        loss = ((real - fake) * ((real - x) - 1.2 * (real - fake)) / m).sum()
        (wanted,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8 * float(wanted.abs().max()))


@pytest.mark.parametrize("strategy", ["teacher", "long-short"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_gradient_is_that_of_the_loss(prediction: str, strategy: str, tmp_path: Path) -> None:
    check_gradient(engine, prediction, strategy, tmp_path)


MUTANTS = {
    "the teacher as the prompt is": ('(self.teacher, "real", batch.of_teacher)', '(self.teacher, "real", batch.cond)'),
    "the critic with the other": (
        'elif critic:\n            asked.append((CRITIC, "fake", batch.cond))',
        'elif critic:\n            asked.append((CRITIC, "fake", batch.of_teacher))',
    ),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_remap_is_found_out(change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.distribution_matching", *change, monkeypatch)
    must_fail(lambda wrong: check_gradient(wrong, "flow", "teacher", tmp_path), module)


@pytest.mark.parametrize("case", [CASES[5], CASES[6]], ids=str)
def test_descent_puts_the_other_in_its_place_and_keeps_the_rest(case: Case) -> None:
    """In closed form: from pure noise a picture is the student's mean. Prompt 0 is forgotten for prompt 1: its mean
    comes to W c_1, that of the others to their own W c."""
    world = World(case)
    words = torch.eye(3)[[0, 1, 2, 1]][:, None]
    world.cond, asked = Cond(words), Cond(words[[1, 1, 2, 1]])
    world.roles.copy("student", "critic")
    recipe, settings = Recipe.for_student(world.schedule, 1, "unet", ()), settings_for("sfd", matching_guidance=1.0)
    made, gaps, wanted = method.sfd(settings), [], world.mean("teacher", asked)
    for step in range(160):
        batch = replace(world.batch(step=step), teachers=asked)
        x = generate(world.denoise, recipe, batch)
        gaps.append(np.square(world.mean("student", world.cond) - wanted).sum(1))
        g, _ = made.cotangent(world.denoise, batch, x)
        x.backward(g / len(batch))
        for factor in world.roles.parameters("student"):
            assert factor.grad is not None
            factor.detach().sub_(0.1 * factor.grad)
            factor.grad = None
        world.roles.lerp("critic", "student", 1.0)
    assert gaps[-1][0] < 0.2 * gaps[0][0] and (gaps[-1][1:] < 0.01).all(), gaps[-1]


def test_it_is_sid_where_nothing_is_named() -> None:
    told = {"matching_guidance": 2.5, "alpha": 1.1, "level_high": 0.8, "normaliser_floor": 0.1}
    assert method.sfd(settings_for("sfd", **told)) == sid(settings_for("sid", **told))


# -- prompts ----------------------------------------------------------------------------------------------------------


def told(forget: str, instead: str = "") -> Any:
    return settings_for("sfd", forget=forget, instead=instead)


@pytest.mark.parametrize(
    ("text", "forget", "instead", "wanted"),
    [
        ("a cat on a mat", "cat", "dog", "a dog on a mat"),
        ("A CAT, a Cat's tail", "cat", "dog", "A dog, a dog's tail"),
        ("concatenate the catalogue", "cat", "dog", "concatenate the catalogue"),
        ("cats and kittens", "cat, cats, kittens", "dogs", "dogs and dogs"),
        ("a black  cat and a cat", "cat, black cat", "dog", "a dog and a dog"),
        ("in the style of Van Gogh, oil", "van gogh", "", "in the style of , oil"),
        ("cat", "cat", "", ""),
        ("C++ and c.t", "c++, c.t", r"\1 {0}", r"\1 {0} and \1 {0}"),
        ("cut and ct", "c.t", "x", "cut and ct"),
        ("猫 in the sun", "猫", "dog", "dog in the sun"),
    ],
)
def test_whole_words_are_replaced(text: str, forget: str, instead: str, wanted: str) -> None:
    assert method.in_its_place(text, told(forget, instead)) == wanted


def test_prompts_that_do_not_serve_are_refused() -> None:
    texts = ["a cat", "a house"]
    method.check_texts(texts, told("cat"))
    for settings, prompts, match in (
        (told(" , "), texts, "forget is empty: give the words"),
        (told("dog"), texts, "none of the 2 prompts names 'dog': nothing would be forgotten"),
        (told("cat, house"), texts, "all of the 2 prompts name 'house', 'cat': nothing would hold what stays"),
        (told("cat", "a big Cat"), texts, "instead is 'a big Cat', which names 'Cat', to be forgotten"),
    ):
        with pytest.raises(OneStepError, match=match):
            method.check_texts(prompts, settings)


def test_a_run_without_the_word_is_refused_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(OneStepError, match="none of the 5 prompts names 'cats'"):
        distil(SmallHost(), PROMPTS, small(method="sfd", forget="cats"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert "forgets cats: prompts are read without it" in METHODS["sfd"].note(told("cats"))
    assert "dogs is drawn instead" in METHODS["sfd"].note(told("cats", "dogs"))


class Ragged(SmallHost):
    """Its texts have a token for each word, padded under a mask."""

    def texts(self, prompts: Sequence[str], negative: bool = False) -> Cond:
        whole, counts = super().texts(prompts), [1 + len(prompt.split()) for prompt in prompts]
        text = torch.cat([whole.text] * 3, 1)[:, : max(counts)]
        mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        return Cond(text * mask[..., None], mask)


@pytest.mark.parametrize("host", [SmallHost(), Ragged()], ids=["even", "ragged"])
def test_the_teacher_is_asked_by_the_changed_prompt(host: Any, tmp_path: Path) -> None:
    """And the student by the prompt; the share is what is told; micro-batches are as the batch."""
    settings = small(method="sfd", forget="birds", instead="very large dogs", forget_share=0.75)
    setup, seen = setup_of(host, settings, tmp_path), []
    of = {text: host.texts([text]) for text in (*PROMPTS, "two very large dogs")}
    for step in range(100):
        batch = setup.prompts.batch(step, range(4))
        halves = [setup.prompts.batch(step, rows) for rows in (range(2), range(2, 4))]
        for row in range(4):
            text = next(t for t in PROMPTS if same(of[t], batch.cond[row : row + 1]))
            asked = text.replace("birds", "very large dogs")
            assert same(of[asked], batch.of_teacher[row : row + 1])
            assert same(of[asked], halves[row // 2].of_teacher[row % 2 : row % 2 + 1])
            seen.append(text)
    assert np.mean([text == "two birds" for text in seen]) == pytest.approx(0.75, abs=0.07)
    assert {*seen} == {*PROMPTS}


def same(one: Cond, other: Cond) -> bool:
    """Of the tokens that are real."""
    texts = [cond.text[0] if cond.mask is None else cond.text[0][cond.mask[0]] for cond in (one, other)]
    return texts[0].shape == texts[1].shape and torch.equal(*texts)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("naming", [1, 10, 95])
def test_shares_of_long_lists(naming: int, share: float, tmp_path: Path) -> None:
    texts = [f"a cat {n}" for n in range(naming)] + [f"a house {n}" for n in range(100 - naming)]
    settings = small(method="sfd", forget="cat", instead="dog", forget_share=share)
    prompts = setup_of(SmallHost(), settings, tmp_path, texts).prompts
    assert prompts.drawn is not None and {*prompts.drawn.tolist()} == {*range(100)}
    assert float((prompts.drawn < naming).double().mean()) == pytest.approx(share, rel=0.25, abs=0.02)
    counts = prompts.drawn.bincount()
    assert counts[:naming].unique().numel() == 1 == counts[naming:].unique().numel()


# -- whole runs -------------------------------------------------------------------------------------------------------


def test_what_the_teacher_makes_is_of_the_changed_prompt(tmp_path: Path) -> None:
    """Pairs, and what the watch compares with."""
    host = SmallHost()
    setup = setup_of(host, small(method="sfd", forget="two birds", instead="stones", pairs=32), tmp_path / "run")
    pairs = Pairs(host, setup.prompts, setup.settings, tmp_path / "pairs")
    stones, birds = host.texts(["stones"]), host.texts(["two birds"])
    found = 0
    with host.denoiser.roles.installed():
        for block in range(8):
            batch, (noise, x) = pairs.draw(setup.prompts.batch(block, range(4)), block)
            for row in range(4):
                if torch.equal(batch.cond.text[row], birds.text[0]):
                    one = replace(batch, cond=stones, teachers=None, samples=[row])
                    wanted = teach(host, setup.settings, one, noise[row : row + 1])
                    torch.testing.assert_close(x[row : row + 1], wanted)
                    found += 1
        watch = Watch.prepare(setup, METHODS["sfd"].reference(setup))
        for row, cond in enumerate(watch.batch.cond.text):
            asked = stones if torch.equal(cond, birds.text[0]) else Cond(cond[None])
            one = replace(watch.batch, cond=asked, teachers=None, samples=[row])
            wanted = teach(host, setup.settings, one, watch.noise[row : row + 1])
            torch.testing.assert_close(watch.teacher[row : row + 1], wanted)
    assert found


@pytest.mark.broad
def test_a_run_that_is_stopped_ends_as_if_not(tmp_path: Path) -> None:
    cut, whole = cancelled_and_whole(tmp_path, small(method="sfd", **FORGET, anchor=0.5), 20)
    assert whole["files"] == cut["files"] and whole["metrics"] == cut["metrics"]


@pytest.mark.parametrize("prediction", narrowed(["epsilon", "v_prediction", "flow"], "flow"))
def test_whole_runs(prediction: str, tmp_path: Path) -> None:
    made = run(tmp_path / "run", small(method="sfd", **FORGET, critic_pictures="shared"), host=SmallHost(prediction))
    assert made.recipe.steps == 1 and np.isfinite(made.metrics[-1]["distance"])
    assert any("forgets birds, bird: dogs is drawn instead" in note for note in made.notes)
