"""Tuning on pictures: both terms in closed form and by finite differences, whole runs that go on, bad folders."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from narrowed import narrowed
from oracles import CASES, TAU, At, Case, World, drawn, rows
from PIL import Image
from small_host import PROMPTS, SmallHost, setup_of, small
from whole_runs import cancelled_and_whole, factors, newest, run

from onestep.core.errors import OneStepError
from onestep.core.recipe import PRESETS, Recipe
from onestep.core.tensor_file import read_tensors
from onestep.training.engine.levels import WEIGHTS
from onestep.training.engine.student import BackwardSimulation
from onestep.training.methods import METHODS, kept, settings_for
from onestep.training.methods import tune as method

PREDICTIONS = ["epsilon", "v_prediction", "flow"]
FINITE = [case for case in CASES if case.alpha > 0]

# -- the terms --------------------------------------------------------------------------------------------------------


def check_ordinary(module: ModuleType, case: Case) -> None:
    """w |D(alpha x + sigma n) - x|^2 in NumPy, and its gradient in the mean by the chain rule."""
    world, x = World(case), drawn(seed=2)
    lam = np.log(case.alpha / case.sigma)
    weight = 1 + np.exp(2 * lam)
    batch = world.batch()
    loss = module.Ordinary(At(case.sigma), WEIGHTS["v"])(world.denoise, batch, x)
    loss.backward()
    x_t = case.alpha * rows(x) + case.sigma * rows(batch.normal("picture's noise"))
    error = world.x0("student", x_t, world.cond) - rows(x)
    assert float(loss.detach()) == pytest.approx(weight * (error**2).sum(1).mean(), rel=1e-6)
    d_mean = weight * 2 * error / 4 * case.sigma**2 / (case.alpha**2 * TAU**2 + case.sigma**2)
    world.check_gradient(d_mean)


@pytest.mark.parametrize("case", FINITE, ids=str)
def test_the_ordinary_loss_in_closed_form(case: Case) -> None:
    check_ordinary(method, case)


def check_kept(module: ModuleType, case: Case, before: str = "teacher") -> None:
    """|D(x_k) - D_0(x_k)|^2 at the states of the model as it was, which no gradient goes through."""
    world = World(case)
    recipe = Recipe.for_student(world.schedule, 2, "unet", ())
    batch = world.batch()
    was = BackwardSimulation(world.denoise, recipe)(batch, role=before, train=False)
    loss = module.Kept(BackwardSimulation(world.denoise, recipe), before)(world.denoise, batch)
    loss.backward()
    alpha = world.schedule.alpha(was.sigma).numpy()
    sigma = was.sigma.numpy()
    error = world.x0("student", rows(was.x), world.cond, alpha, sigma) - world.x0(
        before, rows(was.x), world.cond, alpha, sigma
    )
    assert float(loss.detach()) == pytest.approx((error**2).sum(1).mean(), rel=1e-6)
    gain = (sigma**2 / (alpha**2 * TAU**2 + sigma**2))[:, None]
    world.check_gradient(2 * error / 4 * gain)


@pytest.mark.parametrize("before", ["teacher", "critic"])
@pytest.mark.parametrize("case", FINITE, ids=str)
def test_what_is_kept_in_closed_form(case: Case, before: str) -> None:
    check_kept(kept, case, before)


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4]], ids=str)
def test_the_gradients_by_finite_differences(case: Case) -> None:
    """Of both terms together, in float64."""
    world, x = World(case), drawn(seed=2)
    factors_of = world.double_factors("student")
    recipe = Recipe.for_student(world.schedule, 2, "unet", ())
    learn = method.Ordinary(At(case.sigma), WEIGHTS[method.natural(world.denoise)])
    hold = kept.Kept(BackwardSimulation(world.denoise, recipe))

    def loss() -> torch.Tensor:
        batch = world.batch()
        return learn(world.denoise, batch, x) + 0.7 * hold(world.denoise, batch)

    loss().backward()
    for factor in factors_of:
        assert factor.grad is not None
        step = 1e-6 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.no_grad():
            factor.add_(step)
            above = float(loss())
            factor.sub_(2 * step)
            below = float(loss())
            factor.add_(step)
        assert (above - below) / 2 == pytest.approx(float((factor.grad * step).sum()), rel=1e-5, abs=1e-12)


def test_the_weight_is_of_what_the_network_predicts() -> None:
    """w |x0 - x0'|^2 is |eps - eps'|^2, |v - v'|^2, or of a flow's velocity."""
    for case in (CASES[0], CASES[2], CASES[4]):
        world, x = World(case), drawn(seed=3)
        sigma = world.sigma()
        batch = world.batch()
        x_t = case.alpha * x + case.sigma * batch.normal("picture's noise")
        with world.roles.use("student"):
            x0 = world.denoise(x_t, sigma, world.cond)
        noise, told = batch.normal("picture's noise"), (x_t - case.alpha * x0) / case.sigma
        errors = {
            "eps": told - noise,
            "v": case.alpha * (told - noise) - case.sigma * (x0 - x),
            "flow": (told - noise) - (x0 - x),
        }
        name = method.natural(world.denoise)
        assert name == case.answers
        wanted = float(errors[name].detach().square().flatten(1).sum(1).mean())
        found = method.Ordinary(At(case.sigma), WEIGHTS[name])(world.denoise, batch, x)
        assert float(found.detach()) == pytest.approx(wanted, rel=1e-6)


MUTANTS = {
    "unweighted": ("cast_as(at(self.weight, denoise.schedule, sigma), error) * error", "error"),
    "another role's error": (
        "with denoise.roles.use(STUDENT):\n            error = (denoise(x_t",
        'with denoise.roles.use("critic"):\n            error = (denoise(x_t',
    ),
    "a mean for a sum": ("- x).square().flatten(1).sum(1)", "- x).square().flatten(1).mean(1)"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_ordinary_loss_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.tune", *change, monkeypatch)
    must_fail(lambda mutated: check_ordinary(mutated, CASES[0]), module)


KEPT_MUTANTS = {
    "its own states": ("role=self.before, train=False", "role=STUDENT, train=False"),
    "held to its own": ("batch.cond) - was.x0", "batch.cond) - 0.5 * was.x0"),
    "at another level": ("was.x, was.sigma", "was.x, 0.9 * was.sigma"),
}


@pytest.mark.parametrize("change", KEPT_MUTANTS.values(), ids=list(KEPT_MUTANTS))
def test_a_wrong_hold_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.kept", *change, monkeypatch)
    must_fail(lambda mutated: check_kept(mutated, CASES[4]), module)


def test_held_alone_a_model_as_it_was_stays() -> None:
    """Its fixed point: without pictures' gradient, what has not moved is not moved."""
    world = World(CASES[4])
    recipe = Recipe.for_student(world.schedule, 2, "unet", ())
    loss = kept.Kept(BackwardSimulation(world.denoise, recipe), "student")(world.denoise, world.batch())
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(not bool(factor.grad.any()) for factor in world.roles.parameters("student") if factor.grad is not None)


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures of two shapes, each of another colour, with captions."""
    place = tmp_path / "my own"
    place.mkdir()
    for row in range(7):
        wide = row % 3 == 0
        Image.new("RGB", (96, 64) if wide else (64, 64), (30 * row, 255 - 30 * row, 80)).save(place / f"{row}.png")
        (place / f"{row}.txt").write_text(f"\ufeffpicture number {row}\n", encoding="utf-8")
    return place


def tuned(folder: Path, **changes: Any) -> Any:
    return small(**{"method": "tune", "pictures": str(folder), "student_steps": 2, "drawn": "few", **changes})


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_run_learns_from_the_pictures(prediction: str, folder: Path, tmp_path: Path) -> None:
    made = run(tmp_path / "run", tuned(folder), host=SmallHost(prediction))
    state = read_tensors(newest(tmp_path / "run") / "state.safetensors")
    assert {name.split("/")[0] for name in state if "/" in name} == {"student", "ema"}
    assert [line["phase"] for line in made.metrics if line["update"]] == ["tune"] * 4
    assert all({"pictures", "kept"} <= line.keys() for line in made.metrics if line["update"])
    first = next(line for line in made.metrics if line["update"] == 0)
    assert first["distance"] == pytest.approx(1) and first["variety"] == pytest.approx(1)
    assert made.recipe.steps == 2 and made.recipe.renoise
    assert any(bool(value.any()) for name, value in read_tensors(made.path).items() if "lora_up" in name)
    for line in made.metrics:
        assert np.isfinite(line.get("distance", 0.0))


@pytest.mark.parametrize("poll", narrowed([14, 21], 21))
def test_a_run_that_is_stopped_ends_as_if_not(poll: int, folder: Path, tmp_path: Path) -> None:
    cut, whole = cancelled_and_whole(tmp_path, tuned(folder), poll)
    assert whole["files"] == cut["files"] and whole["metrics"] == cut["metrics"]
    other = run(tmp_path / "other" / "run", tuned(folder, keep=0.0))
    assert factors(other.path) != factors(tmp_path / "whole" / "run" / "result.safetensors")


def test_a_run_goes_on_without_its_folder(folder: Path, tmp_path: Path) -> None:
    """What it began with it has: captions, buckets, latents. Only the check wants the pictures."""
    pool = method.CaptionedPictures(setup_of(SmallHost(), tuned(folder, sizes="64x64"), tmp_path / "run"))
    pool.prepare()
    before = [pool.draw(pool.setup.prompts.batch(step, range(4))) for step in range(12)]
    (folder / "0.png").unlink()
    (folder / "1.txt").write_text("something else")
    again = method.CaptionedPictures(setup_of(SmallHost(), tuned(folder, sizes="64x64"), tmp_path / "run"))
    after = [again.draw(again.setup.prompts.batch(step, range(4))) for step in range(12)]
    for (batch, x), (other, y) in zip(before, after, strict=True):
        assert torch.equal(x, y) and torch.equal(batch.cond.text, other.cond.text)
    assert {tuple(x.shape[2:]) for _, x in before} == {(8, 8), (6, 10)}


def test_a_student_goes_on_from_its_lora(folder: Path, tmp_path: Path) -> None:
    """An initial LoRA is what is tuned, and what it was is what is held: its first loss of that is 0."""
    first = run(tmp_path / "first", small(method="regression", student_steps=2))
    made = run(tmp_path / "run", tuned(folder, drawn="auto", initial_lora=str(first.path)))
    lines = [line for line in made.metrics if line["update"]]
    assert lines[0]["kept"] == pytest.approx(0, abs=1e-10) and lines[-1]["kept"] > 0
    assert made.recipe.timesteps == first.recipe.timesteps


# -- how the model is drawn -------------------------------------------------------------------------------------------


def test_a_base_of_many_steps_is_tuned_as_any(folder: Path, tmp_path: Path) -> None:
    settings = small(method="tune", pictures=str(folder))
    made = run(tmp_path / "run", settings)
    assert made.recipe.steps == settings.teacher_steps and made.recipe.guidance == settings.guidance
    assert not made.recipe.renoise and all("kept" not in line for line in made.metrics)
    assert any("no few steps are held, for the model draws in 3 steps with guidance 4" in note for note in made.notes)


def test_a_preset_says_how_it_is_drawn(folder: Path) -> None:
    host, wanted = SmallHost(), PRESETS["lcm-4"]
    found = METHODS["tune"].recipe(host, small(method="tune", pictures=str(folder), drawn="lcm-4"))
    assert found.timesteps == wanted.timesteps and found.sizes == ((32, 32),)
    with pytest.raises(OneStepError, match="drawn is z-image-turbo-8, a preset of .*Z-Image.*, and small is"):
        METHODS["tune"].recipe(host, small(method="tune", pictures=str(folder), drawn="z-image-turbo-8"))
    with pytest.raises(OneStepError, match="nitrosd-realism-1 is drawn by a network that answers or is given times"):
        METHODS["tune"].recipe(host, small(method="tune", pictures=str(folder), drawn="nitrosd-realism-1"))
    with pytest.raises(OneStepError, match="drawn is 'manny'; did you mean 'many'"):
        METHODS["tune"].recipe(host, small(method="tune", pictures=str(folder), drawn="manny"))


# -- folders ----------------------------------------------------------------------------------------------------------


def refused(folder: Path, match: str, **changes: Any) -> None:
    with pytest.raises(OneStepError, match=match):
        METHODS["tune"].check_all(SmallHost(), tuned(folder, **changes), False)


def test_what_it_cannot_learn_from_is_refused(folder: Path, tmp_path: Path) -> None:
    METHODS["tune"].check_all(SmallHost(), tuned(folder), False)
    with pytest.raises(OneStepError, match="pictures is empty: give the folder"):
        METHODS["tune"].check(SmallHost(), settings_for("tune"))
    refused(tmp_path / "none", "pictures is .*none', which is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "pictures is .*empty', a folder with no pictures in it")
    (folder / "3.txt").unlink()
    refused(folder, r"the picture '3.png' has no caption: write what it shows into '3.txt' beside it, or set caption")
    METHODS["tune"].check_all(SmallHost(), tuned(folder, caption="a colour"), False)
    (folder / "3.txt").write_bytes(b"\xff\xfe\x00")
    refused(folder, "the caption '3.txt' cannot be read .it is no UTF-8 text.: save it as UTF-8")
    (folder / "3.txt").write_text("x" * 5000)
    refused(folder, "the caption '3.txt' has 5000 characters, more than 4000: 'xxx")


def test_a_shape_that_fits_no_size_is_refused(folder: Path) -> None:
    Image.new("RGB", (640, 64)).save(folder / "long.png")
    refused(folder, r"'long.png' is 640x64: of the sizes around the run's the nearest in shape is \d+x\d+", caption="a")
    (folder / "long.png").write_bytes(b"no picture")
    refused(folder, "the picture 'long.png' of pictures cannot be read", caption="a")


def test_buckets_have_about_the_area_of_the_runs_size() -> None:
    from onestep.training.data.captioned_pictures import buckets

    for around in ([(1024, 1024)], [(512, 768)], [(32, 32)]):
        found = buckets(around)
        area = around[0][0] * around[0][1]
        assert found[0] == around[0] and len(found) == len(set(found))
        assert all(0.5 * area < width * height <= area for width, height in found)
        assert all(0.5 <= width / height <= 2 for width, height in found)
    assert {(1024, 1024), (1152, 896), (896, 1152), (1408, 704)} <= set(buckets([(1024, 1024)]))


def test_one_picture_is_enough_to_begin(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.stem != "0":
            path.unlink()
    made = run(tmp_path / "run", tuned(folder))
    assert len(PROMPTS) > 1 and np.isfinite(made.metrics[-1]["distance"])
