"""Pairwise sample optimisation: the margin in closed form and by finite differences, its cap, whole runs, folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from narrowed import narrowed
from oracles import CASES, Case, World, drawn, rows
from own_pictures import pairs_in
from PIL import Image
from small_host import SmallHost, setup_of, small
from whole_runs import Cancelled, at_call, left, run

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.core.roles import TEACHER
from onestep.core.tensor_file import read_tensors
from onestep.training.engine.levels import WEIGHTS
from onestep.training.methods import METHODS, settings_for
from onestep.training.methods import pso as method

FINITE = [case for case in CASES if "t = 1" not in case.name and "zero" not in case.name]
TAU = 0.7

# -- the loss ---------------------------------------------------------------------------------------------------------


def preference(module: Any, world: World, steps: int = 2, **changes: Any) -> Any:
    recipe = Recipe.for_student(world.schedule, steps, "unet", ())
    return module.Preference(recipe, **{"beta": 2.0, "cap": 3.0, "weight": WEIGHTS["x0"], **changes})


def in_numpy(world: World, made: Any, better: torch.Tensor, worse: torch.Tensor, before: str) -> tuple[Any, Any]:
    """(m [B], its gradient in the student's mean [B, WIDTH]) from the equation; weights of x0."""
    batch = world.batch()
    levels = made.recipe.levels(world.schedule)
    sigma = float(levels[batch.choice(len(levels), "pair's level")])
    alpha = float(world.schedule.alpha(torch.tensor(sigma, dtype=torch.float64)))
    noise = rows(batch.normal("pair's noise"))
    left = {}
    for name, x in (("w", rows(better)), ("l", rows(worse))):
        x_k = alpha * x + sigma * noise
        for role in ("student", before):
            left[role, name] = world.x0(role, x_k, world.cond, np.full(4, alpha), np.full(4, sigma)) - x
    e = {key: np.square(value).mean(1) for key, value in left.items()}
    m = made.beta * ((e[before, "w"] - e["student", "w"]) - (e[before, "l"] - e["student", "l"]))
    gain = sigma**2 / (alpha**2 * TAU**2 + sigma**2)
    d_mean = -made.beta * 2 / m_size(better) * gain * (left["student", "w"] - left["student", "l"])
    return m, d_mean


def m_size(x: torch.Tensor) -> int:
    return x[0].numel()


def check_loss(module: ModuleType, case: Case, before: str = TEACHER, cap: float = 3.0) -> None:
    world, better, worse = World(case), drawn(seed=2), drawn(seed=7)
    made = preference(module, world, before=before, cap=cap)
    margins = made.margins(world.denoise, world.batch(), better, worse)
    wanted, d_mean = in_numpy(world, made, better, worse, before)
    np.testing.assert_allclose(margins.detach().numpy(), wanted, rtol=1e-6, atol=1e-9)
    loss = made.loss(margins)
    capped = np.minimum(wanted, cap)
    assert float(loss.detach()) == pytest.approx(np.log1p(np.exp(-capped)).mean(), rel=1e-6)
    loss.backward()
    # dL/dm = -s(-m) below the cap, 0 above
    slope = -1 / (1 + np.exp(wanted)) * (wanted < cap) / len(wanted)
    world.check_gradient(slope[:, None] * d_mean)


@pytest.mark.parametrize("before", [TEACHER, "critic"])
@pytest.mark.parametrize("case", FINITE, ids=str)
def test_the_loss_in_closed_form(case: Case, before: str) -> None:
    check_loss(method, case, before)


@pytest.mark.parametrize("case", FINITE, ids=str)
def test_a_pair_that_is_told_apart_teaches_nothing_more(case: Case) -> None:
    """Some of the four are beyond the cap, some are not."""
    world, better, worse = World(case), drawn(seed=2), drawn(seed=7)
    m, _ = in_numpy(world, preference(method, world), better, worse, TEACHER)
    check_loss(method, case, cap=float(np.median(m)))


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4]], ids=str)
@pytest.mark.parametrize("weight", sorted(WEIGHTS))
def test_the_gradient_by_finite_differences(weight: str, case: Case) -> None:
    world, better, worse = World(case), drawn(seed=2), drawn(seed=7)
    factors = world.double_factors("student")
    made = preference(method, world, steps=4, weight=WEIGHTS[weight], cap=50.0)

    def loss() -> torch.Tensor:
        return made.loss(made.margins(world.denoise, world.batch(), better, worse))

    loss().backward()
    for factor in factors:
        assert factor.grad is not None
        step = 1e-6 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.no_grad():
            factor.add_(step)
            above = float(loss())
            factor.sub_(2 * step)
            below = float(loss())
            factor.add_(step)
        assert (above - below) / 2 == pytest.approx(float((factor.grad * step).sum()), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4]], ids=str)
def test_where_it_begins(case: Case) -> None:
    """A model as it was has margin 0: log 2, whatever the pair; an exchanged pair is the opposite; two pictures that
    are one teach nothing."""
    world, better, worse = World(case), drawn(seed=2), drawn(seed=7)
    made = preference(method, world, before="student")
    assert float(made.loss(made.margins(world.denoise, world.batch(), better, worse)).detach()) == pytest.approx(
        np.log(2)
    )
    made = preference(method, world, before="critic")
    first, second = (made.margins(world.denoise, world.batch(), *pair) for pair in ((better, worse), (worse, better)))
    torch.testing.assert_close(first, -second)
    same = made.margins(world.denoise, world.batch(), better, better)
    made.loss(same).backward()
    assert not bool(same.detach().any())
    assert all(factor.grad is None or not bool(factor.grad.any()) for factor in world.roles.parameters("student"))


@pytest.mark.parametrize("case", CASES[5:], ids=str)
def test_from_noise_alone_it_moves_towards_the_better_until_the_cap(case: Case) -> None:
    """A one-step model from pure noise draws its mean whatever the noise: m = 2 beta / n (mu - mu_0) . (x_w - x_l), and
    descent follows that line to where m = cap, and stays."""
    world, better, worse = World(case), drawn(seed=2), drawn(seed=7)
    made = preference(method, world, steps=1, before="critic")
    world.roles.copy("student", "critic")
    before = world.mean("student", world.cond)
    for _ in range(150):
        margins = made.margins(world.denoise, world.batch(), better, worse)
        made.loss(margins).backward()
        slopes = [factor.grad.clone() for factor in world.roles.parameters("student") if factor.grad is not None]
        for factor, slope in zip(world.roles.parameters("student"), slopes, strict=True):
            factor.detach().sub_(2 * slope)
            factor.grad = None
    moved = world.mean("student", world.cond) - before
    wanted = 2 * made.beta / 8 * (moved * (rows(better) - rows(worse))).sum(1)
    np.testing.assert_allclose(margins.detach().numpy(), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted > made.cap).all() and all(not bool(slope.any()) for slope in slopes), wanted


BOTH = "error(STUDENT, better) - error(STUDENT, worse)"
NOISED = "x_k = add_noise(denoise.schedule, x, noise, sigma)"
MUTANTS = {
    "the worse preferred": (BOTH, "error(STUDENT, worse) - error(STUDENT, better)"),
    "no reference": ("self.beta * (was - (", "self.beta * (0 * was - ("),
    "another role's error": ("was = error(self.before, better)", "was = error(STUDENT, better)"),
    "a noise for each": (NOISED, NOISED.replace("noise,", "noise * (1 + 0.1 * (x is worse)),")),
    "no cap": ("margins.clamp_max(self.cap)", "margins"),
    "a cap below": ("margins.clamp_max(self.cap)", "margins.clamp_min(self.cap)"),
    "a sum for a mean": ("flatten(1).mean(1)", "flatten(1).sum(1)"),
    "a mean of margins": ("-logsigmoid(margins.clamp_max(self.cap)).mean()", "-logsigmoid(margins.mean())"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_loss_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def check(module: ModuleType) -> None:
        check_loss(module, CASES[0], "critic")
        test = World(CASES[4])
        m, _ = in_numpy(test, preference(module, test), drawn(seed=2), drawn(seed=7), TEACHER)
        check_loss(module, CASES[4], cap=float(np.median(m)))

    check(method)
    must_fail(check, mutant("onestep.training.methods.pso", *change, monkeypatch))


def test_each_of_its_own_levels_is_looked_at() -> None:
    """And no other: the network is asked at the recipe's four alone."""
    world, seen = World(CASES[4]), set()
    made = preference(method, world, steps=4)
    world.network.register_forward_pre_hook(lambda module, args: seen.add(round(float(args[1][0]), 6)))
    for step in range(40):
        made.margins(world.denoise, world.batch(step=step), drawn(seed=2), drawn(seed=7))
    assert len(seen) == 4
    times = world.schedule.time_of_sigma(made.recipe.levels(world.schedule))
    assert sorted(seen) == pytest.approx(sorted(times.tolist()), rel=1e-5)


# -- whole runs -------------------------------------------------------------------------------------------------------


def preferred(folder: Path, **changes: Any) -> Any:
    pairs = {} if (folder / "better").is_dir() else pairs_in(folder)
    own = pairs or {"pictures": str(folder), "drawn": "few"}
    return small(**{"method": "pso", "student_steps": 2, **own, **changes})


@pytest.mark.parametrize("prediction", narrowed(["epsilon", "v_prediction", "flow"], "epsilon", "flow"))
def test_a_run_learns_what_is_preferred(prediction: str, tmp_path: Path) -> None:
    settings = preferred(tmp_path / "own", steps=12, keep=0.5)
    made = run(tmp_path / "run", settings, host=SmallHost(prediction))
    lines = [line for line in made.metrics if line["update"]]
    assert lines[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert lines[0]["preference"] == pytest.approx(np.log(2), abs=1e-5)
    assert lines[-1]["margin"] > 0 and lines[-1]["preference"] < np.log(2)
    assert all({"kept", "told_apart"} <= line.keys() for line in lines)
    assert made.recipe.steps == 2 and made.metrics[0]["distance"] == pytest.approx(1)
    assert any(bool(value.any()) for name, value in read_tensors(made.path).items() if "lora_up" in name)


def test_a_student_goes_on_from_its_lora(tmp_path: Path) -> None:
    """What it was as the run began is what it is compared with, not the base."""
    first = run(tmp_path / "first", small(method="regression", student_steps=2))
    settings = preferred(tmp_path / "own", drawn="auto", initial_lora=str(first.path))
    made = run(tmp_path / "run", settings)
    lines = [line for line in made.metrics if line["update"]]
    assert lines[0]["margin"] == pytest.approx(0, abs=1e-5) and lines[-1]["margin"] > 0
    assert made.recipe.timesteps == first.recipe.timesteps


def test_a_run_goes_on_without_its_folder(tmp_path: Path) -> None:
    settings = preferred(tmp_path / "own")
    run(tmp_path / "whole" / "run", settings)
    with pytest.raises(Cancelled):
        run(tmp_path / "cut" / "run", settings, host=SmallHost(on_poll=at_call(21, Cancelled())))
    for place in ("better", "worse"):
        (tmp_path / "own" / place / "0.png").unlink()
    run(tmp_path / "cut" / "run", settings, existing="continue")
    whole, cut = left(tmp_path / "whole" / "run"), left(tmp_path / "cut" / "run")
    assert whole["files"] == cut["files"] and whole["metrics"] == cut["metrics"]


def test_a_pair_is_of_one_size_and_one_caption(tmp_path: Path) -> None:
    """The worse one in the bucket of the better, whatever its own shape and ending; both of one pair."""
    pairs_in(tmp_path / "own", side=64)
    own, host = tmp_path / "own", SmallHost()
    Image.new("RGB", (96, 64), (0, 10, 250)).save(own / "better" / "0.png")
    (own / "worse" / "1.png").unlink()
    Image.new("RGB", (200, 40), (1, 250, 250)).save(own / "worse" / "1.jpg")
    setup = setup_of(host, preferred(own, sizes="64x64"), tmp_path / "run")
    pool = method.PreferencePairs(setup)
    pool.prepare()
    shapes, found = set(), {}
    for step in range(30):
        batch, better, worse = pool.draw(setup.prompts.batch(step, range(4)))
        assert better.shape == worse.shape
        shapes.add(tuple(better.shape[2:]))
        for text, good, bad in zip(batch.cond.text, better, worse, strict=True):
            key = (round(float(good[0, 0, 0]), 3), round(float(bad[0, 0, 0]), 3), round(float(text[0, 0]), 4))
            found[key] = found.get(key, 0) + 1
    assert shapes == {(8, 8), (6, 10)} and len(found) == 3
    captions = host.texts([f"picture number {row}" for row in range(3)]).text[:, 0, 0]
    assert {key[2] for key in found} == {round(float(value), 4) for value in captions}


# -- folders ----------------------------------------------------------------------------------------------------------


def refused(folder: Path, match: str, **changes: Any) -> None:
    with pytest.raises(OneStepError, match=match):
        METHODS["pso"].check_all(SmallHost(), preferred(folder, **changes), False)


def test_what_it_cannot_learn_from_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "own"
    settings = preferred(own)
    METHODS["pso"].check_all(SmallHost(), settings, False)
    with pytest.raises(OneStepError, match="both pictures and reward are empty: give the folder .* or a reward"):
        METHODS["pso"].check(SmallHost(), settings_for("pso"))
    (own / "better" / "2.txt").unlink()
    refused(own, "the picture '2.png' has no caption: write what it shows into '2.txt' beside it, or set caption")
    METHODS["pso"].check_all(SmallHost(), preferred(own, caption="a colour"), False)
    (own / "worse" / "1.png").rename(own / "worse" / "7.png")
    refused(own, r"1 of the pictures in better have no partner of their name in worse .'1.png' the first.", caption="a")
    Image.new("RGB", (32, 32)).save(own / "worse" / "1.png")
    refused(own, r"1 of the pictures in worse have no partner of their name in better .'7.png' the first.", caption="a")
    (own / "worse" / "7.png").rename(own / "worse" / "1.webp")
    refused(own, "worse holds two pictures of the name '1'", caption="a")
    (own / "worse" / "1.webp").unlink()
    (own / "worse" / "1.png").write_bytes((own / "better" / "1.png").read_bytes())
    refused(own, "the two pictures of the pair '1' are the same file: neither is better", caption="a")
    for path in (own / "worse").iterdir():
        path.unlink()
    refused(own, r"pictures is .*worse', a folder with no pictures in it", caption="a")
    (own / "worse").rmdir()
    refused(own, "in which there is no folder worse: of each pair put the picture that you prefer into", caption="a")
    missing = replace(settings, own=replace(settings.own, pictures=str(tmp_path / "none")))
    with pytest.raises(OneStepError, match="which is no folder that can be read"):
        METHODS["pso"].check_all(SmallHost(), missing, False)


def test_one_pair_is_told_of(tmp_path: Path) -> None:
    made = run(tmp_path / "run", preferred(tmp_path / "own", **pairs_in(tmp_path / "own", count=1)))
    assert any("one pair tells what is better of one picture alone" in note for note in made.notes)
