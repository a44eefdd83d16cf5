"""The watch's numbers against their definitions, written out; and what they do when a student gets better or burns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_host import SmallHost, setup_of, small

from onestep.core.sampling import teacher_sample
from onestep.training.engine.inputs import recipe_of
from onestep.training.methods.distribution_matching import Scores, score_metrics
from onestep.training.watch.measures import Watch, compare, patch_distance, variety
from onestep.training.watch.reference import by_teacher


def test_variety_is_the_mean_distance_within_a_prompt() -> None:
    x = torch.randn(6, 2, 3, 3)
    rows = x.flatten(1).numpy().astype(np.float64)
    groups = [rows[:3], rows[3:]]
    pairs = [[np.linalg.norm(g[i] - g[j]) for i in range(3) for j in range(i)] for g in groups]
    assert variety(x, 3) == pytest.approx(float(np.mean([np.mean(p) for p in pairs])), rel=1e-5)
    assert variety(x, 1) == 0 and variety(torch.ones(4, 2, 3, 3), 2) == 0


def test_patch_distance_is_wasserstein_along_directions() -> None:
    """Equal sets are 0 apart in any order; a shift c of every pixel moves a 3 x 3 patch of C channels by c along each
    direction's sum: rms over unit directions is c, as 9 C c^2 / (9 C)."""
    x = torch.randn(8, 2, 4, 4)
    assert patch_distance(x, x[torch.randperm(8)]) == pytest.approx(0, abs=1e-6)
    assert patch_distance(x, x + 0.5) == pytest.approx(0.5, rel=0.25)
    assert patch_distance(x, x + 1.0) == pytest.approx(2 * patch_distance(x, x + 0.5), rel=1e-4)


def test_the_measures_of_known_changes() -> None:
    teacher = torch.randn(16, 2, 4, 4)
    same = compare(teacher, teacher, 4)
    assert same["distance"] == pytest.approx(0, abs=1e-6) and same["content"] == pytest.approx(0, abs=1e-6)
    assert same["variety"] == pytest.approx(1) and same["spread"] == pytest.approx(1)
    burnt = compare(1.5 * teacher, teacher, 4)
    assert burnt["spread"] == pytest.approx(1.5) and burnt["variety"] == pytest.approx(1.5) and burnt["distance"] > 0.1
    centre = teacher.unflatten(0, (-1, 4)).mean(1)
    collapsed = compare(centre.repeat_interleave(4, 0), teacher, 4)
    assert collapsed["variety"] == pytest.approx(0, abs=1e-5) and collapsed["content"] == pytest.approx(0, abs=1e-6)
    assert collapsed["spread"] < 0.7 and collapsed["distance"] > 0.1
    rms = float(centre.square().mean().sqrt() / teacher.square().mean().sqrt())
    assert compare(0 * teacher, teacher, 4)["content"] == pytest.approx(rms, rel=1e-5)


def test_the_numbers_of_a_student_update() -> None:
    """gap = rms(D_F - D_c) / rms(D_c - x), cos of the two: 1 where the critic sees the student as it is."""
    x, real = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    numbers = score_metrics(Scores(x, x, torch.ones(3), real, fake=real - 0.25 * (real - x)))
    assert numbers["gap"] == pytest.approx(0.25, rel=1e-5) and numbers["cos"] == pytest.approx(-1, abs=1e-5)
    assert numbers["x_mean"] == pytest.approx(float(x.mean())) and numbers["x_std"] == pytest.approx(float(x.std()))
    still = score_metrics(Scores(x, x, torch.ones(3), real, fake=real))
    assert still["gap"] == 0 and still["cos"] == 0
    assert set(score_metrics(Scores(x, x, torch.ones(3), real))) == {"x_mean", "x_std"}


def test_the_watch_looks_at_the_same_pictures_always(tmp_path: Path) -> None:
    """Teacher at its steps and guidance, student by its recipe, from the same noise and prompts."""
    host, settings = SmallHost(), small(watch_samples=10, teacher_steps=4)
    setup = setup_of(host, settings, tmp_path)
    roles = host.denoiser.roles
    roles.add("student", 2, 0)
    with roles.installed():
        watch = Watch.prepare(setup, by_teacher(setup))
        assert len(watch.noise) == 8, "whole groups of four"
        assert all(torch.equal(watch.batch.cond.text[row], watch.batch.cond.text[row // 4 * 4]) for row in range(8))
        with torch.no_grad():
            wanted = teacher_sample(host.denoiser, watch.batch.cond, watch.batch.nulls(), watch.noise, 4, 4.0)
        torch.testing.assert_close(watch.teacher, wanted, rtol=1e-5, atol=1e-5)
        recipe = recipe_of(host, settings)
        first = watch(host, recipe, "student")
        assert watch(host, recipe, "student") == first
        again = Watch.prepare(setup, by_teacher(setup), watch.latents)
        assert again(host, recipe, "student") == first
        for _, b in roles.state("student").values():
            b.normal_()
        assert watch(host, recipe, "student") != first
    assert not watch.student(host, recipe, "student").requires_grad
