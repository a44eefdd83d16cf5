"""The watch's distance: how far apart two sets of pictures look to their frozen base, against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_host import SmallHost, setup_of, small

from onestep.core.memory import Slices
from onestep.core.roles import TEACHER
from onestep.training.engine.inputs import recipe_of
from onestep.training.watch.look import SHARE, apart, energy_distance, looks
from onestep.training.watch.measures import Watch, patch_distance
from onestep.training.watch.reference import by_teacher


def test_the_energy_distance_is_its_definition() -> None:
    """2 E|a - b| - E|a - a'| - E|b - b'|, every pair written out."""
    a, b = torch.randn(5, 3), 2 * torch.randn(7, 3) + 1

    def mean(x: torch.Tensor, y: torch.Tensor) -> float:
        return float(np.mean([[np.linalg.norm(p - q) for q in y.double().numpy()] for p in x.double().numpy()]))

    assert energy_distance(a, b) == pytest.approx(2 * mean(a, b) - mean(a, a) - mean(b, b), rel=1e-9)
    assert energy_distance(a, a[torch.randperm(5)]) == pytest.approx(0, abs=1e-6)
    # of points in one dimension it is twice the squared L2 distance of their distribution functions
    assert energy_distance(torch.zeros(2, 1), torch.ones(3, 1)) == pytest.approx(2)


def test_apart_is_the_mean_over_blocks_in_units_of_the_teachers_deviation() -> None:
    teacher = [torch.randn(8, 4), torch.randn(8, 9)]
    student = [value + 0.3 * torch.randn_like(value) + 0.5 for value in teacher]
    each = []
    for ours, theirs in zip(student, teacher, strict=True):
        scale = theirs.double().numpy().std(0, ddof=1)
        ours, theirs = (torch.from_numpy(side.double().numpy() / scale) for side in (ours, theirs))
        each.append(energy_distance(ours, theirs) / ours.shape[1] ** 0.5)
    assert apart(student, teacher) == pytest.approx(np.mean(each) ** 0.5, rel=1e-9)
    assert apart(teacher, teacher) == pytest.approx(0, abs=1e-6)
    # units of each feature do not matter, and no feature that is constant makes it infinite
    units = [torch.logspace(-3, 3, value.shape[1]) for value in teacher]
    moved = [[value * unit for value, unit in zip(side, units, strict=True)] for side in (student, teacher)]
    assert apart(*moved) == pytest.approx(apart(student, teacher), rel=1e-4)
    assert np.isfinite(apart([torch.zeros(4, 2)], [torch.zeros(4, 2)]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_picture_that_is_no_number_is_no_distance(bad: float) -> None:
    """0 would be the best of all: the choice and "no gain" would take it."""
    teacher = [torch.randn(8, 4), torch.randn(8, 9)]
    for block in range(2):
        student = [value.clone() for value in teacher]
        student[block][3, 1] = bad
        assert np.isnan(apart(student, teacher))


def test_the_watch_sees_what_the_base_sees(tmp_path: Path) -> None:
    """Written out by hand: the base at 0.3 of its time, deviations over the positions of each block's answer."""
    host, settings = SmallHost(), small(watch_samples=8, teacher_steps=2)
    setup, roles = setup_of(host, settings, tmp_path), host.denoiser.roles
    roles.add("student", 2, 0)
    with roles.installed():
        watch = Watch.prepare(setup, by_teacher(setup))
        recipe = recipe_of(host, settings)
        found = watch.student(host, recipe, "student")
        numbers = watch.measured(host, found)
        assert len(looks(host)) == len(host.blocks) > 1
        seen: list[list[torch.Tensor]] = []
        for latents in (found, watch.teacher):
            kept: list[torch.Tensor] = []
            handles = [
                block.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out)) for block in host.blocks
            ]
            sigma = host.denoiser.schedule.sigma_at(torch.full((8,), SHARE, dtype=torch.float64))
            alpha = host.denoiser.schedule.alpha(sigma)
            noise = watch.batch.normal("watch look")
            x = (alpha.view(-1, 1, 1, 1) * latents + sigma.view(-1, 1, 1, 1) * noise).float()
            with roles.use(TEACHER), torch.no_grad():
                host.denoiser(x, sigma, watch.batch.cond)
            for handle in handles:
                handle.remove()
            seen.append([_deviation(out) for out in kept])
        assert numbers["distance"] == pytest.approx(apart(*seen), rel=1e-4)
        assert numbers["detail"] == pytest.approx(patch_distance(found, watch.teacher), rel=1e-6)
        assert watch.measured(host, watch.teacher)["distance"] == pytest.approx(0, abs=1e-5)
        broken = found.clone()
        broken[5] = torch.nan
        assert np.isnan(watch.measured(host, broken)["distance"])
        again = Watch.prepare(setup, by_teacher(setup), watch.latents, slices=Slices(3, "the watch's pictures"))
        assert again.measured(host, found)["distance"] == pytest.approx(numbers["distance"], rel=1e-4)


def _deviation(out: object) -> torch.Tensor:
    """[B, C] of a block's [B, C, h, w], [B, L, C] or (text, picture)."""
    value = out[-1] if isinstance(out, tuple) else out
    assert isinstance(value, torch.Tensor)
    return value.flatten(2).std(2, correction=0) if value.ndim == 4 else value.std(1, correction=0)
