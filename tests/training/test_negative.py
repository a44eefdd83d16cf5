"""A negative prompt learnt: the teacher's moves and the loss in closed form, the cases, and runs that resume to the
bit."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from narrowed import narrowed
from oracles import CASES, WIDTH, Array, Case, World, drawn, rows
from small_host import SmallHost, setup_of, small
from tiny_pipelines import sd, sd3
from torch import Tensor, nn
from whole_runs import Cancelled, at_call, left, run

from onestep.core.adapter_file import load_adapter
from onestep.core.adapter_module import Call
from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.negative_adapter import MAKERS
from onestep.core.recipe import Recipe
from onestep.pipelines.adapt import DiffusersHost, adapt
from onestep.training.data.cases import cases, parts
from onestep.training.data.segments import Moves
from onestep.training.distil import distil
from onestep.training.methods import multi_step_consistency as method
from onestep.training.methods.sun import segments
from onestep.training.settings import Settings

GUIDED = [case for case in CASES if case.name != "eps, last time"]
PROMPTS = ["a cat: fat, red", "a red dog", "a house, in snow"]
W, V = 3.0, 1.7


def jumped(x: Array, x0: Array, levels: tuple[float, float], lower: tuple[float, float]) -> Array:
    """alpha' x0 + sigma' (x - alpha x0) / sigma, levels as (alpha, sigma)."""
    return lower[0] * x0 + lower[1] * (x - levels[0] * x0) / levels[1]


def levels_of(world: World, sigma: float) -> tuple[float, float]:
    return float(world.schedule.alpha(torch.tensor(sigma, dtype=torch.float64))), sigma


# -- the teacher's moves ----------------------------------------------------------------------------------------------


def check_walk(module: ModuleType, case: Case) -> None:
    """Three steps of D_0 + w (D_c - D_0) - v (D_cn - D_c), the last to a picture."""
    world, x = World(case), drawn()
    both = Cond(torch.randn(4, 1, 3, generator=torch.Generator().manual_seed(7)))
    null = world.null.repeat(4)
    sigmas = torch.tensor([case.sigma, 0.6 * case.sigma, 0.2 * case.sigma, 0.0], dtype=torch.float64)
    with torch.no_grad(), world.roles.use("teacher"):
        found = module.solve(world.denoise, x, sigmas, (world.cond, null, both), W, V)
        alone = module.solve(world.denoise, x, sigmas, (world.cond, null, world.cond), W, V)
        guided = module.solve(world.denoise, x, sigmas, (world.cond, null, both), W, 0.0)
    at, pure = rows(x), rows(x)
    for sigma, below in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        # the network is told the nearest time it was trained at
        time = world.schedule.time_of_sigma(torch.tensor(sigma, dtype=torch.float64))
        told = levels_of(world, float(world.schedule.sigma_of_time(time)))
        here, lower = levels_of(world, sigma), levels_of(world, below)

        def answer(z: Array, cond: Cond, here: Any = here, told: Any = told) -> Array:
            return closed(case, world, z, cond, here, told)

        d_c, d_0, d_cn = (answer(at, cond) for cond in (world.cond, null, both))
        at = jumped(at, d_0 + W * (d_c - d_0) - V * (d_cn - d_c), here, lower)
        d_c, d_0 = answer(pure, world.cond), answer(pure, null)
        pure = jumped(pure, d_0 + W * (d_c - d_0), here, lower)
    np.testing.assert_allclose(rows(found), at, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(rows(guided), pure, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(rows(alone), pure, rtol=1e-6, atol=1e-8)


def closed(case: Case, world: World, z: Array, cond: Cond, here: tuple[float, float], told: Any) -> Array:
    """x0 at ``here`` of a network that answers for ``told``."""
    x0 = world.x0("teacher", z, cond, *told)
    noise = (z - told[0] * x0) / told[1]
    if case.answers == "x0":
        return x0
    if case.answers == "eps":
        return (z - here[1] * noise) / here[0]
    if case.answers == "flow":
        return z - here[1] * (noise - x0)
    return here[0] * z - here[1] * (told[0] * noise - told[1] * x0)


@pytest.mark.parametrize("case", GUIDED, ids=str)
def test_the_teachers_steps_in_numpy(case: Case) -> None:
    check_walk(method, case)


def test_levels_between_are_equal_steps_of_time() -> None:
    world = World(CASES[0])
    first, last = (world.schedule.sigma_of_time(torch.tensor(time)) for time in (800.0, 400.0))
    found = method.levels_between(world.schedule, first, last, 0.75, 3)
    assert world.schedule.time_of_sigma(found).tolist() == [700, 600, 500, 400]
    to_picture = method.levels_between(world.schedule, first, torch.zeros(()).double(), 0.5, 2)
    assert world.schedule.time_of_sigma(to_picture[:2]).tolist() == [400, 200] and float(to_picture[2]) == 0


# -- the loss ---------------------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """A side that takes the negative from the Gaussian world's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))
        self.before, self.after = frozenset[str](), frozenset({"mean"})

    def on_input(self, name: str, x: Tensor, call: Call) -> Tensor:
        return x

    def on_output(self, name: str, x: Tensor, output: Tensor, call: Call) -> Tensor:
        return output - self.by * call.inputs["negative"].text[:, 0]


def moves(world: World, case: Case, negative: Cond, lower: float) -> Moves:
    """Segments that end where the student would with its mean moved by the negative."""
    x = drawn()
    mean = world.mean("teacher", world.cond) - negative.text[:, 0].numpy()
    a, s = case.alpha, case.sigma
    x0 = mean + a * 0.49 / (a**2 * 0.49 + s**2) * (rows(x) - a * mean)
    end = jumped(rows(x), x0, (a, s), levels_of(world, lower))
    below = torch.full((4,), lower, dtype=torch.float64)
    return Moves(x, world.sigma(), below, torch.tensor(end).reshape(x.shape), negative)


def check_loss(module: ModuleType, case: Case, lower: float) -> None:
    world = World(case)
    world.roles.drop("student")
    world.roles.add_module("student", Shifted())
    negative = Cond(torch.randn(4, 1, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    data = moves(world, case, negative, lower)
    objective, batch = module.MultiStepConsistency(), world.batch()
    right = objective(world.denoise, batch, data)
    assert float(right.detach()) < 1e-18
    # any other negative leaves the distance between the two ends
    other = moves(world, case, Cond(negative.text.flip(0)), lower)
    wrong = objective(world.denoise, batch, Moves(data.x, data.sigma, data.lower, other.end, negative))
    wanted = np.square(rows(data.end) - rows(other.end)).sum(1).mean()
    assert float(wrong.detach()) == pytest.approx(wanted, rel=1e-8) and wanted > 1e-3
    wrong.backward()
    by = world.roles.modules["student"].by
    slopes = []
    for at in range(WIDTH):
        ends = []
        for step in (1e-6, -2e-6):
            by.data[at] += step
            with torch.no_grad():
                moved = Moves(data.x, data.sigma, data.lower, other.end, negative)
                ends.append(float(objective(world.denoise, batch, moved)))
        by.data[at] += 1e-6
        slopes.append((ends[0] - ends[1]) / 2e-6)
    np.testing.assert_allclose(by.grad.numpy(), slopes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", GUIDED, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_student_that_obeys_has_no_loss(case: Case, share: float) -> None:
    """To a picture, and to the next level of a student of several steps."""
    check_loss(method, case, share * case.sigma)


MUTANTS = {
    "towards the negative": ("- v * (d_cn - d_c)", "+ v * (d_cn - d_c)"),
    "away from the null": ("- v * (d_cn - d_c)", "- v * (d_cn - d_0)"),
    "unguided": ("d_0 + w * (d_c - d_0)", "d_c"),
    "one step": ("x = jump(denoise.schedule, x, negative_guided", "return jump(denoise.schedule, x, negative_guided"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_teacher_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.multi_step_consistency", *change, monkeypatch)
    must_fail(lambda mutated: check_walk(mutated, CASES[0]), module)


@pytest.mark.parametrize(
    "change",
    [
        (".flatten(1).sum(1).mean()", ".flatten(1).mean(1).mean()"),
        ("STUDENT, negative=data.negative", "STUDENT, negative=Cond(data.negative.text.flip(0))"),
        ("jump(denoise.schedule, data.x, x0, data.sigma, data.lower) - data.end", "x0 - data.end"),
    ],
)
def test_a_wrong_loss_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.multi_step_consistency", *change, monkeypatch)
    must_fail(lambda mutated: check_loss(mutated, CASES[0], 0.3 * CASES[0].sigma), module)


def cases_of(prompts: list[str], settings: Settings) -> list[Any]:
    return cases(prompts, settings.own.named, settings)


# -- the cases --------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_prompt() -> None:
    assert parts("demons: neqoxec, purple") == ["demons", "neqoxec", "purple"]
    assert parts("(a:1.2) cat,dog ,  red,") == ["(a:1.2) cat,dog", "red"] and parts("a cat") == ["a cat"]


def test_a_case_keeps_the_beginning_and_avoids_what_it_has_not() -> None:
    found = cases_of(PROMPTS, small(method="sun", pairs=300))
    assert found == cases_of(PROMPTS, small(method="sun", pairs=300)) != cases_of(PROMPTS, small(method="sun", seed=4))
    every = {part for prompt in PROMPTS for part in parts(prompt)}
    assert {case.negative for case in found} == every | {""}
    assert {case.prompt for case in found} >= {"a cat", "a cat: fat", "a cat: fat, red", "a red dog", "a house"}
    for case in found:
        assert any(prompt.startswith(case.prompt) for prompt in PROMPTS)
        assert case.negative not in parts(case.prompt)
        assert case.both == (f"{case.prompt}, {case.negative}" if case.negative else case.prompt)
    empty = sum(not case.negative for case in found) / len(found)
    assert 0.05 < empty < 0.4  # a tenth, and where two draws give the same prompt whole
    own = [case for case in found if case.prompt == "a cat: fat" and case.negative == "red"]
    assert own and len(cases_of(PROMPTS, small(method="sun", pairs=10_000))) == 512


def test_negatives_of_ones_own() -> None:
    found = cases_of(PROMPTS, small(method="sun", pairs=100, negatives="people, blurry,, red "))
    assert {case.negative for case in found} == {"people", "blurry", "red", ""}
    assert not any(case.negative == "red" and case.prompt.endswith("red") for case in found)


def test_prompts_that_leave_nothing_to_avoid_are_refused() -> None:
    with pytest.raises(OneStepError, match="1 prompts, 'a cat' the first, leave nothing to keep away from"):
        cases_of(["a cat"], small(method="sun"))
    with pytest.raises(OneStepError, match="push is 0"):
        small(method="sun", push=0.0)
    assert cases_of(["a cat"], small(method="sun", negatives="dogs"))[0].prompt == "a cat"


# -- segments ---------------------------------------------------------------------------------------------------------


def sun_settings(**changes: Any) -> Settings:
    values = {"method": "sun", "sizes": "16x16", "steps": 4, "batch": 2, "pairs": 4, "watch_samples": 4, "ema": 0.5}
    return small(**{**values, "segment_steps": 2, "push": V, "guidance": W, **changes})


def hosted() -> DiffusersHost:
    torch.manual_seed(0)
    return adapt(sd(), device="cpu")


@pytest.mark.parametrize("steps", narrowed([1, 2], 2))
def test_a_segment_ends_where_the_students_jump_and_the_teachers_difference_lead(steps: int, tmp_path: Path) -> None:
    host, settings = hosted(), sun_settings(student_steps=steps, pairs=8)
    roles, schedule = host.denoiser.roles, host.denoiser.schedule
    roles.add("student", 2, 0)
    for _, b in roles.state("student").values():
        b.normal_(std=0.3)
    setup = setup_of(host, settings, tmp_path, PROMPTS)
    made, recipe = segments(setup), setup.recipe
    found = [made.draw(made.prompts.batch(at, range(2)), at) for at in range(4)]
    told = [*recipe.levels(schedule).tolist(), 0.0]
    assert {float(data.sigma[0]) for _, data in found} == set(told[:-1])
    case_list = cases_of(PROMPTS, settings)
    for update, (batch, data) in enumerate(found):
        at = [int(made._prompt(update, row)) for row in range(2)]
        assert torch.equal(data.negative.text, host.encode([case_list[i].negative for i in at], (16, 16)).text)
        both, null = (host.encode(t, (16, 16)) for t in ([case_list[i].both for i in at], ["", ""]))
        sigma, lower = float(data.sigma[0]), float(data.lower[0])
        assert told[told.index(sigma) + 1] == lower
        with torch.no_grad(), roles.use("student"):
            g = host.denoiser(data.x, data.sigma, batch.cond)
        high, low = (float(schedule.time_of_sigma(torch.tensor(s).double())) if s else 0.0 for s in (sigma, lower))
        times = low + 0.75 * (high - low) * np.array([1, 0.5, 0])
        levels = [*schedule.sigma_of_time(torch.tensor(times))[:2].tolist(), lower]
        pair = []
        for v in (V, 0.0):
            z = by_hand(schedule, data.x, g, sigma, levels[0])
            for here, there in zip(levels[:-1], levels[1:], strict=True):
                at_level = torch.full((2,), here, dtype=torch.float64)
                with torch.no_grad(), roles.use("teacher"):
                    d_c, d_0, d_cn = (host.denoiser(z, at_level, cond) for cond in (batch.cond, null, both))
                z = by_hand(schedule, z, d_0 + W * (d_c - d_0) - v * (d_cn - d_c), here, there)
            pair.append(z)
        wanted = by_hand(schedule, data.x, g, sigma, lower) + pair[0] - pair[1]
        torch.testing.assert_close(data.end, wanted, rtol=1e-4, atol=1e-4)
    host.release()


def by_hand(schedule: Any, x: Tensor, x0: Tensor, sigma: float, lower: float) -> Tensor:
    alpha, below = (float(schedule.alpha(torch.tensor(level, dtype=torch.float64))) for level in (sigma, lower))
    return below * x0 + lower * (x - alpha * x0) / sigma


# -- whole runs -------------------------------------------------------------------------------------------------------


def sun_run(folder: Path, existing: str = "stop", poll: Any = None) -> Any:
    host = hosted()
    host.on_poll = poll
    try:
        return distil(host, PROMPTS, sun_settings(), folder, existing=existing)
    finally:
        host.release()


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = sun_run(tmp_path / "whole" / "run")
    with pytest.raises(Cancelled):
        sun_run(tmp_path / "cut" / "run", poll=at_call(5, Cancelled()))
    sun_run(tmp_path / "cut" / "run", "continue")
    assert left(tmp_path / "cut" / "run") == left(tmp_path / "whole" / "run")
    assert any(name.startswith("segments/") for name in left(tmp_path / "whole" / "run")["files"])
    adapter = load_adapter(whole.path, MAKERS, "unet")
    assert adapter.kind == "negative-attention" and any(bool(alpha.any()) for alpha in adapter.module.alpha)
    assert Recipe.from_json(adapter.metadata["onestep.recipe"]).steps == 1


def test_a_base_without_guidance_or_places_is_refused(tmp_path: Path) -> None:
    host = SmallHost()
    with pytest.raises(OneStepError, match="acts on a U-Net's cross-attentions, of which this"):
        run(tmp_path / "run", sun_settings(), host=host)
    host.denoiser.guidance = "embedded"
    with pytest.raises(OneStepError, match="so sun's teacher cannot be guided"):
        run(tmp_path / "run", sun_settings(), host=host)
    joint = adapt(sd3(), device="cpu")
    with pytest.raises(OneStepError, match="for others there is steering"):
        distil(joint, PROMPTS, sun_settings(), tmp_path / "run")
    joint.release()
    assert not (tmp_path / "run").exists()
