"""Progressive distillation: its target is the authors', the later stages' teacher is the student as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import CASES, Case, World, drawn, rows
from small_host import SmallHost, setup_of, small
from trajectory_oracle import led, ratios
from whole_runs import cancelled_and_whole, run

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.core.tensor_file import read_tensors
from onestep.training.engine.student import STUDENT, add_student
from onestep.training.methods import METHODS, progressive, settings_for
from onestep.training.methods import trajectory as engine
from onestep.training.methods.earlier_student import EARLIER

WORLDS = [case for case in CASES if case.name != "x0"]


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_its_loss_is_the_papers(case: Case) -> None:
    """w |D - (x'' - (s''/s) x) / (a'' - (s''/s) a)|^2, w = max(a^2 / s^2, 1) (Algorithm 2): two steps of the guided
    teacher, in x0."""
    world, x0, noise = World(case), drawn(seed=1), drawn(seed=2)
    recipe = Recipe.for_student(world.schedule, 2, "unet", (), 0.9 if case.answers == "eps" else 1.0)
    times = engine.Grid(recipe, 4, engine.PhaseEnd(4), stride=2, every=2)
    loss = engine.TwoTimes(times, engine.TeacherSteps(3.0, 3.0), engine.square, progressive.truncated_snr)
    start = engine.Noised(x0, noise, torch.tensor([0.999, 0.6, 0.3, 0.1], dtype=torch.float64))
    span = times(world.schedule, world.batch(), start.u)
    t, middle, r = (level.numpy()[:, None] for level in span.path)
    assert np.all(r == span.s.numpy()[:, None]) and set(np.round(t[:, 0], 9)) <= set(
        np.round(times.levels(world.schedule)[::2].numpy(), 9)
    )
    x = begun = ratios(world, t) * rows(x0) + t * rows(noise)
    null = world.cond.null_like(world.null)
    for sigma, lower in ((t, middle), (middle, r)):
        d_c, d_u = (world.x0("teacher", x, cond, ratios(world, sigma), sigma) for cond in (world.cond, null))
        x = led(world, x, d_u + 3 * (d_c - d_u), sigma, lower)
    target = (x - r / t * begun) / (ratios(world, r) - r / t * ratios(world, t))
    found = world.x0(STUDENT, begun, world.cond, ratios(world, t), t)
    weight = np.maximum(ratios(world, t) ** 2 / t**2, 1)
    wanted = (weight * (found - target) ** 2).sum(1).mean()
    assert float(loss(world.denoise, world.batch(), start).detach()) == pytest.approx(wanted, rel=1e-6)


def test_each_stage_learns_from_the_student_as_it_was(tmp_path: Path) -> None:
    """From the base first; then from what was learnt until then, with half as many steps."""
    host, settings = SmallHost("flow"), small(method="progressive", steps=6, halvings=3, student_steps=2)
    setup = setup_of(host, settings, tmp_path)
    add_student(host, settings, None)
    plan = METHODS["progressive"].plan(setup)
    names = [(phase.name, phase.updates) for phase in plan.phases]
    assert names == [("progressive, 8 steps", 2), ("progressive, 4 steps", 2), ("progressive, 2 steps", 2)]
    roles, teachers = host.denoiser.roles, [progressive.teacher_of(setup, stage) for stage in range(3)]
    assert [(one.role, one.low) for one in teachers] == [("teacher", 4.0), (EARLIER, 1.0), (EARLIER, 1.0)]
    with torch.no_grad():
        for _, b in roles.state(STUDENT).values():
            b.fill_(0.25)
    with roles.installed():
        plan.phases[1].turns[0].loss(setup.prompts.batch(2, range(4)), 1.0, 2)
    assert all(bool((b == 0.25).all()) for _, b in roles.state(EARLIER).values())
    with torch.no_grad():
        for _, b in roles.state(STUDENT).values():
            b.fill_(0.5)
    with roles.installed():
        plan.phases[1].turns[0].loss(setup.prompts.batch(3, range(4)), 1.0, 3)
        assert all(bool((b == 0.25).all()) for _, b in roles.state(EARLIER).values())
        plan.phases[2].turns[0].loss(setup.prompts.batch(4, range(4)), 1.0, 4)
    assert all(bool((b == 0.5).all()) for _, b in roles.state(EARLIER).values())
    assert len(read_tensors(tmp_path / "stages" / "002.safetensors")) == 14


@pytest.mark.parametrize("poll", [14, 20])
def test_a_run_that_is_cancelled_in_a_later_stage_goes_on_to_the_same_end(poll: int, tmp_path: Path) -> None:
    cut, whole = cancelled_and_whole(tmp_path, small(method="progressive", steps=6, halvings=3, watch_every=0), poll)
    assert cut == whole


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(OneStepError, match="steps 2 are fewer than halvings 4: give each stage an update"):
        settings_for("progressive", steps=2)
    told: dict[str, Any] = {"method": "progressive", "steps": 4, "halvings": 2, "watch_every": 0, "preview_every": 0}
    run(tmp_path / "run", small(**told))
    (tmp_path / "run" / "stages" / "001.safetensors").unlink()
    with pytest.raises(OneStepError, match="001.safetensors, is gone, from which this stage learns"):
        run(tmp_path / "run", small(**told | {"steps": 5}), existing="continue")
