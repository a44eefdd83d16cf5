"""What a run of method sun sees of its student: its own pictures, with a negative and as that is to change them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from narrowed import narrowed
from PIL import Image
from small_host import setup_of, small
from tiny_pipelines import sd
from torch import Tensor
from whole_runs import Cancelled, at_call, left

from onestep.core.cond import Cond
from onestep.core.sampling import sample
from onestep.core.tensor_file import read_tensors
from onestep.pipelines.adapt import DiffusersHost, adapt
from onestep.training.data import cases
from onestep.training.data.cases import Case
from onestep.training.distil import distil
from onestep.training.methods import sun as method
from onestep.training.methods.sun import by_change, student_recipe
from onestep.training.settings import Settings
from onestep.training.watch.measures import Watch, patch_distance, watched

PROMPTS = ["a cat: fat, red", "a red dog", "a house, in snow"]
W, V = 3.0, 1.7


def sun(**changes: Any) -> Settings:
    values = {"method": "sun", "sizes": "16x16", "steps": 4, "batch": 2, "pairs": 4, "watch_samples": 12, "ema": 0.0}
    return small(**{**values, "segment_steps": 2, "push": V, "guidance": W, **changes})


@pytest.fixture
def host() -> Any:
    torch.manual_seed(0)
    made = adapt(sd(), device="cpu")
    roles = made.denoiser.roles
    roles.add("student", 2, 0)
    for _, b in roles.state("student").values():
        b.normal_(std=0.3)
    yield made
    made.release()


def prepared(host: DiffusersHost, settings: Settings, folder: Path) -> Watch:
    setup = setup_of(host, settings, folder, PROMPTS)
    return Watch.prepare(setup, by_change(setup))


def watched_case(prompts: list[str], settings: Settings, row: int) -> Case:
    return cases.watched_case(prompts, settings.own.named, settings.seed, row)


# -- the reference ----------------------------------------------------------------------------------------------------


def test_a_watched_prompt_is_kept_away_from_its_last_part() -> None:
    """From a part of another prompt where it has but one; all of it from what the settings name."""
    assert watched_case(PROMPTS, sun(), 0) == Case("a cat: fat", "red")
    assert watched_case(PROMPTS, sun(), 2) == Case("a house", "in snow")
    assert watched_case(["red: a red, red"], sun(), 0) == Case("red: a red, red", ""), "never both asked for and not"
    assert watched_case(["a cat, a cathedral: cat"], sun(), 0) == Case("a cat, a cathedral", "cat")
    single = [watched_case(PROMPTS, sun(seed=seed), 1) for seed in range(60)]
    assert {case.prompt for case in single} == {"a red dog"}
    assert {case.negative for case in single} == {"a cat", "fat", "red", "a house", "in snow"}
    named = sun(negatives=" fat, people,,")
    assert named.own.named == ["fat", "people"] and watched_case(PROMPTS, named, 0) == Case(PROMPTS[0], "people")
    assert watched_case(["a cat"], sun(), 0).both == "a cat"
    assert watched_case(["a cat, fat, red"], sun(negatives="fat"), 0) == Case("a cat", "fat"), "which it has itself"
    assert watched_case(["fat, a cat"], sun(negatives="fat"), 0) == Case("fat, a cat", "")


@pytest.mark.parametrize("steps", narrowed([1, 2], 2))
def test_the_reference_is_the_students_picture_as_the_teacher_would_change_it(
    steps: int, host: DiffusersHost, tmp_path: Path
) -> None:
    """Step by step by hand: the student's answer G, moved so that J(x, D) = J(x, G) + (E_n - E_0)."""
    settings = sun(student_steps=steps)
    recipe, schedule = student_recipe(host, settings), host.denoiser.schedule
    watch = prepared(host, settings, tmp_path)
    assert watched(3, settings).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    found = [watched_case(PROMPTS, settings, row) for row in range(3) for _ in range(4)]
    texts = [[""] * 12, [c.both for c in found], [c.prompt for c in found], [c.negative for c in found]]
    null, both, asked, negatives = (host.encode(text, (16, 16)) for text in texts)
    given = watch.reference.inputs(watch.latents, list(range(12)), watch.noise)["negative"]
    assert torch.equal(given.text, negatives.text)
    assert torch.equal(watch.batch.cond.text, asked.text)
    levels = [*recipe.levels(schedule).tolist(), 0.0]
    for pushed, name in ((True, "x"), (False, "plain")):
        first = alpha(host, levels[0])
        x = (first**2 + levels[0] ** 2) ** 0.5 * watch.noise * recipe.initial_noise_scale
        for step, (sigma, lower) in enumerate(zip(levels, levels[1:], strict=False)):
            with torch.no_grad(), host.denoiser.roles.use("student"):
                d = host.denoiser(x, torch.full((12,), sigma, dtype=torch.float64), watch.batch.cond)
            if pushed:
                end = jumped(host, x, d, sigma, lower) + moved(host, (watch.batch.cond, null, both), x, d, sigma, lower)
                # the D that jumps there: [y - sigma' x / sigma] / [alpha' - sigma' alpha / sigma]
                d = (end - lower / sigma * x) / (alpha(host, lower) - lower / sigma * alpha(host, sigma))
            if lower:
                x = alpha(host, lower) * d + lower * watch.batch.normal(f"watch renoise {step}")
        torch.testing.assert_close(watch.latents[name], d, rtol=1e-3, atol=1e-3)
    assert float((watch.latents["x"] - watch.latents["plain"]).abs().max()) > 0.05


def alpha(host: DiffusersHost, sigma: float) -> float:
    return float(host.denoiser.schedule.alpha(torch.tensor(sigma, dtype=torch.float64)))


def jumped(host: DiffusersHost, x: Tensor, x0: Tensor, sigma: float, lower: float) -> Tensor:
    return alpha(host, lower) * x0 + lower * (x - alpha(host, sigma) * x0) / sigma


def moved(host: DiffusersHost, texts: tuple[Cond, ...], x: Tensor, g: Tensor, sigma: float, lower: float) -> Tensor:
    """E_n - E_0: two steps of the teacher, over the last three quarters of the segment's time."""
    schedule, ends = host.denoiser.schedule, []
    high, low = (float(schedule.time_of_sigma(torch.tensor(s).double())) if s else 0.0 for s in (sigma, lower))
    times = low + 0.75 * (high - low) * np.array([1, 0.5])
    levels = [*schedule.sigma_of_time(torch.tensor(times)).tolist(), lower]
    for v in (V, 0.0):
        z = jumped(host, x, g, sigma, levels[0])
        for here, there in zip(levels, levels[1:], strict=False):
            with torch.no_grad(), host.denoiser.roles.use("teacher"):
                at = torch.full((len(x),), here, dtype=torch.float64)
                d_c, d_0, d_cn = (host.denoiser(z, at, cond) for cond in texts)
            z = jumped(host, z, d_0 + W * (d_c - d_0) - v * (d_cn - d_c), here, there)
        ends.append(z)
    return ends[0] - ends[1]


# -- the measures -----------------------------------------------------------------------------------------------------


def test_distance_is_the_share_of_the_change_that_is_missed(host: DiffusersHost, tmp_path: Path) -> None:
    settings = sun()
    recipe, roles = student_recipe(host, settings), host.denoiser.roles
    side = method.adapter(host, settings)
    roles.add_module("student", side)
    with roles.installed():
        watch = prepared(host, settings, tmp_path)
        assert watch(host, recipe, "student")["distance"] == pytest.approx(1)
        for gain in side.alpha:
            torch.nn.init.normal_(gain, std=0.3, generator=torch.Generator().manual_seed(0))
        numbers, found = watch(host, recipe, "student"), watch.student(host, recipe, "student")
        with (
            torch.no_grad(),
            roles.use("student", **watch.reference.inputs(watch.latents, list(range(12)), watch.noise)),
        ):
            wanted = sample(host.denoiser, recipe, watch.batch.cond, watch.noise, watch.batch.normal)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    missed, whole = ((watch.latents["x"] - x).numpy().std() for x in (found, watch.latents["plain"]))
    means = [float((watch.latents["x"] - x).mean()) for x in (found, watch.latents["plain"])]
    share = np.sqrt(missed**2 + means[0] ** 2) / np.sqrt(whole**2 + means[1] ** 2)
    assert numbers["distance"] == pytest.approx(float(share), rel=1e-4) and numbers["distance"] != pytest.approx(1)
    assert numbers["detail"] == pytest.approx(patch_distance(found, watch.latents["x"]))


@pytest.mark.broad
def test_a_run_shows_without_as_asked_and_with(tmp_path: Path) -> None:
    torch.manual_seed(0)
    host = adapt(sd(), device="cpu")
    settings = sun(watch_every=2, preview_every=2, learning_rate=5e-2)
    first, *others = [line for line in distil(host, PROMPTS, settings, tmp_path / "run").metrics if "distance" in line]
    assert first["distance"] == pytest.approx(1) and all(0 < line["distance"] != 1 for line in others)
    assert sorted(read_tensors(tmp_path / "run" / "reference.safetensors")) == ["plain", "x"]
    begun, ended = (
        torch.from_numpy(np.array(Image.open(tmp_path / "run" / "previews" / name))).float().chunk(3)
        for name in ("000000.png", "000004.png")
    )
    assert torch.equal(begun[0], begun[2]), "a new adapter changes nothing"
    assert not torch.equal(begun[1], begun[0]) and not torch.equal(ended[2], begun[2])
    assert torch.equal(ended[0], begun[0]) and torch.equal(ended[1], begun[1])


def test_without_anything_to_keep_away_from_there_is_no_distance(host: DiffusersHost, tmp_path: Path) -> None:
    settings = sun(negatives="a cat", watch_samples=4)
    setup = setup_of(host, settings, tmp_path, ["a cat"])
    host.denoiser.roles.add_module("student", method.adapter(host, settings))
    with host.denoiser.roles.installed():
        watch = Watch.prepare(setup, by_change(setup))
        assert math.isnan(watch(host, student_recipe(host, settings), "student")["distance"])


@pytest.mark.parametrize("poll", narrowed([2, 14]))
def test_a_cancelled_run_sees_the_same(tmp_path: Path, poll: int) -> None:
    """Two sizes, two steps and a running mean; cancelled while the reference is made, and later with it gone."""

    def distilled(folder: Path, existing: str = "stop", at: int = 0) -> None:
        torch.manual_seed(0)
        host = adapt(sd(), device="cpu")
        host.on_poll = at_call(at, Cancelled()) if at else None
        more: dict[str, Any] = {"ema": 0.5, "student_steps": 2, "sizes": "16x16,24x16", "watch_samples": 4}
        distil(host, PROMPTS, sun(watch_every=2, preview_every=2, **more), folder, existing=existing)

    distilled(tmp_path / "whole" / "run")
    with pytest.raises(Cancelled):
        distilled(tmp_path / "cut" / "run", at=poll)
    (tmp_path / "cut" / "run" / "reference.safetensors").unlink(missing_ok=True)
    distilled(tmp_path / "cut" / "run", "continue")
    assert left(tmp_path / "cut" / "run") == left(tmp_path / "whole" / "run")
