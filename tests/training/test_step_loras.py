"""A LoRA for each step: which factors serve which call, whose gradient is whose, the files, and a run of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from narrowed import narrowed
from oracles import CASES, Case, World, drawn, posterior_mean, rows
from small_host import SmallHost, small
from whole_runs import Cancelled, at_call, left, run

from onestep.core.errors import OneStepError
from onestep.core.lora_file import load_lora
from onestep.core.recipe import Recipe, step_files, step_names
from onestep.core.sampling import sample
from onestep.core.step_roles import part_of
from onestep.training.engine.student import BackwardSimulation
from onestep.training.methods import METHODS, settings_for

THREE = [CASES[0], CASES[2], CASES[4]]
"""eps, v and flow."""


def split_world(case: Case, steps: int = 3) -> tuple[World, Recipe]:
    """A world whose student has other factors at each step."""
    world = World(case)
    recipe = Recipe.for_student(world.schedule, steps, "unet", ())
    world.roles.split("student", recipe.timesteps)
    for step in range(steps):
        for _, b in world.roles.state(part_of("student", step)).values():
            b.add_(0.4 * (step + 1))
    return world, recipe


# -- which factors serve ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", THREE, ids=str)
def test_each_step_is_answered_by_its_own_factors(case: Case) -> None:
    """At a step's own time, and from there down to the next step's; rows of a batch each by their own time."""
    world, recipe = split_world(case)
    last = 0.25 * recipe.timesteps[2]
    times = [*recipe.timesteps, last, 0.5 * (recipe.timesteps[0] + recipe.timesteps[1])]
    steps = [0, 1, 2, 2, 0]
    sigma = world.schedule.sigma_of_time(torch.tensor(times, dtype=torch.float64))
    cond, x = world.cond[torch.tensor([0, 1, 2, 3, 0])], drawn(5)
    with world.roles.use("student"):
        whole = world.denoise(x, sigma, cond)
        each = [world.denoise(x[row : row + 1], sigma[row : row + 1], cond[row : row + 1]) for row in range(5)]
    time = world.schedule.time_of_sigma(sigma)
    level = world.schedule.sigma_of_time(time)
    mean = np.stack([world.mean(part_of("student", step), cond)[row] for row, step in enumerate(steps)])
    wanted = posterior_mean(rows(x), world.schedule.alpha(level).numpy(), level.numpy(), mean)
    np.testing.assert_allclose(rows(whole), wanted, rtol=2e-2 if "flow" not in case.name else 1e-6, atol=1e-2)
    torch.testing.assert_close(torch.cat(each), whole)
    # the others are as they were
    with world.roles.use("critic"):
        critic = world.denoise(x, sigma, cond)
    assert not torch.allclose(critic, whole)


@pytest.mark.parametrize("case", THREE, ids=str)
def test_a_steps_gradient_is_its_own(case: Case) -> None:
    world, recipe = split_world(case)
    simulate, seen = BackwardSimulation(world.denoise, recipe), set()
    for key in range(12):
        for factor in world.roles.parameters("student"):
            factor.grad = None
        step = simulate(world.batch(step=key))
        step.x0.square().sum().backward()
        moved = [
            at
            for at in range(3)
            if any(f.grad is not None and bool(f.grad.any()) for f in world.roles._in_order(part_of("student", at)))
        ]
        assert moved == [step.step]
        seen.add(step.step)
    assert seen == {0, 1, 2} and len(world.roles.parameters("student")) == 6


def test_a_graph_may_run_backward_where_it_was_made_and_nowhere_else() -> None:
    world, recipe = split_world(CASES[4])
    sigma = recipe.levels(world.schedule)[1].expand(4)
    with world.roles.use("student"):
        world.denoise(drawn(), sigma, world.cond).sum().backward()
        x0 = world.denoise(drawn(), sigma, world.cond).sum()
    with world.roles.use("critic"), pytest.raises(OneStepError, match="run backward"):
        x0.backward()


def test_means_follow_step_by_step_and_a_role_is_dropped_with_its_steps() -> None:
    world, recipe = split_world(CASES[4])
    world.roles.copy("student", "ema")
    world.roles.split("ema", recipe.timesteps)
    before = [value.detach().clone() for value in world.roles.parameters("ema")]
    world.roles.lerp("ema", "student", 0.25)
    after, target = world.roles.parameters("ema"), world.roles.parameters("student")
    for now, was, goal in zip(after, before, target, strict=True):
        torch.testing.assert_close(now.detach(), 0.75 * was + 0.25 * goal.detach())
    assert {"ema@2", "ema@3", "student@2", "student@3"} <= set(world.roles.names())
    world.roles.drop("student")
    assert not any(name.startswith("student") for name in world.roles.names())


# -- the files --------------------------------------------------------------------------------------------------------


def test_the_files_are_found_beside_each_other(tmp_path: Path) -> None:
    names = step_names("result.safetensors", 3)
    assert names == ("result.safetensors", "result-2.safetensors", "result-3.safetensors")
    recipe = Recipe((999.0, 666.0, 333.0), files=names)
    for name in (*names, "anna.safetensors", "anna-2.safetensors"):
        (tmp_path / name).write_bytes(b"")
    own = [tmp_path / name for name in names]
    assert step_files(tmp_path / names[0], recipe) == step_files(tmp_path / names[2], recipe) == own
    with pytest.raises(OneStepError, match="one of 3 files.*anna-3.safetensors is not beside it"):
        step_files(tmp_path / "anna.safetensors", recipe)
    (tmp_path / "anna-3.safetensors").write_bytes(b"")
    assert [path.name for path in step_files(tmp_path / "anna.safetensors", recipe)] == [
        "anna.safetensors",
        "anna-2.safetensors",
        "anna-3.safetensors",
    ]
    alone = Recipe((999.0, 499.0), files=("a.safetensors", "a.safetensors"))
    assert step_files(tmp_path / "b.safetensors", alone) == [tmp_path / "b.safetensors"]


# -- a run ------------------------------------------------------------------------------------------------------------

TOLD: dict[str, Any] = {"student_steps": 2, "step_loras": True, "anchor": 0.2, "steps": 6}


@pytest.mark.parametrize("prediction", narrowed(["epsilon", "v_prediction", "flow"], "epsilon", "flow"))
def test_a_run_leaves_a_file_for_each_step_that_draws_as_it_did(prediction: str, tmp_path: Path) -> None:
    """Two files, apart; and what they draw is what the run's own roles drew."""
    host = SmallHost(prediction)
    kept: dict[str, Any] = {}

    def keep(progress: Any) -> None:
        if not progress.preparing:
            roles = host.denoiser.roles
            for role in ("ema", "ema@2", "student", "student@2"):
                kept[role] = {name: (a.clone(), b.clone()) for name, (a, b) in roles.state(role).items()}

    result = run(tmp_path / "run", small(**TOLD), host=host, report=keep)
    assert result.recipe.files == ("result.safetensors", "result-2.safetensors")
    paths = step_files(result.path, Recipe.from_json(load_lora(result.path).recipe or ""))
    states = [load_lora(path).state for path in paths]
    for step, state in enumerate(states):
        for name, (a, b) in kept[part_of(result.role, step)].items():
            assert torch.equal(state[name][0], a) and torch.equal(state[name][1], b)
    assert any(not torch.equal(states[0][name][1], states[1][name][1]) for name in states[0])
    assert "KSampler (Advanced) for each step" in load_lora(result.path).metadata["modelspec.usage_hint"]
    assert host.denoiser.roles.names() == []


STOPPED = [(method, poll) for method in ("dmd", "cdm", "tdm") for poll in (14, 23)]


@pytest.mark.parametrize(("method", "poll"), narrowed(STOPPED, ("tdm", 14)))
def test_a_run_that_is_stopped_ends_as_if_not(method: str, poll: int, tmp_path: Path) -> None:
    """All steps' factors, moments and means, to the bit; also where a batch's rows lie in several steps (cdm)."""
    settings = small(method=method, **TOLD)
    run(tmp_path / "whole" / "run", settings)
    with pytest.raises(Cancelled):
        run(tmp_path / "cut" / "run", settings, host=SmallHost(on_poll=at_call(poll, Cancelled())))
    assert (tmp_path / "cut" / "run" / "partial-2.safetensors").is_file()
    run(tmp_path / "cut" / "run", settings, existing="continue")
    whole, cut = left(tmp_path / "whole" / "run"), left(tmp_path / "cut" / "run")
    assert whole["files"] == cut["files"] and whole["metrics"] == cut["metrics"]
    second = [(tmp_path / name / "run" / "result-2.safetensors").read_bytes() for name in ("whole", "cut")]
    assert second[0] == second[1] and not list((tmp_path / "cut" / "run").glob("partial*.safetensors"))


def test_equal_factors_at_every_step_draw_as_one(tmp_path: Path) -> None:
    """Where they have not been trained apart, a role of several steps is that of one."""
    world = World(CASES[4])
    recipe = Recipe.for_student(world.schedule, 4, "sd3", ())
    with world.roles.use("student"):
        one = sample(world.denoise, recipe, world.cond, drawn(), lambda step: drawn(seed=step))
    world.roles.split("student", recipe.timesteps)
    with world.roles.use("student"):
        several = sample(world.denoise, recipe, world.cond, drawn(), lambda step: drawn(seed=step))
    assert torch.equal(one, several)


def test_what_has_no_several_steps_is_refused() -> None:
    with pytest.raises(OneStepError, match="needs several steps.*student_steps to 2 to 8"):
        METHODS["dmd"].check(SmallHost(), settings_for(step_loras=True))
    with pytest.raises(OneStepError, match="follow 0.1 needs one LoRA"):
        settings_for(step_loras=True, student_steps=2, follow=0.1)


def test_one_of_several_files_is_no_donor(tmp_path: Path) -> None:
    result = run(tmp_path / "run", small(**TOLD))
    with pytest.raises(OneStepError, match="one of 2, each for a step of its own"):
        run(tmp_path / "next", small(initial_lora=str(result.path)))
    run(tmp_path / "own", small(initial_lora=str(result.path), initial_recipe="own"))
