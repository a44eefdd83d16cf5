"""Continuous-time consistency in closed form: its coordinates, its tangents, its gradient and where that is nothing."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from oracles import CASES, TAU, Array, Case, World, drawn, rows
from small_host import SmallHost, small
from torch import Tensor
from trajectory_oracle import ratios
from whole_runs import run

from onestep.core.continuous import ContinuousVP, continuous
from onestep.core.errors import OneStepError
from onestep.core.lora_file import load_lora
from onestep.core.roles import TEACHER
from onestep.core.schedule import VPSchedule, expand
from onestep.training.engine.student import STUDENT
from onestep.training.methods import scm as method
from onestep.training.methods.tangents import Differences, Forward, by_forward_mode, straight_on
from onestep.training.methods.trig_flow import TrigFlow, rotated

WORLDS = [case for case in CASES if case.name != "x0"]
KINDS = [case for case in CASES if case.name in ("eps", "v", "flow")]
TANGENT = Differences(0.01, 0.05, 1.45, rotated)


def posterior(mean: Array, x: Array, t: Array) -> Array:
    """D*(x, t) of a Gaussian, in these coordinates."""
    cos, sin = np.cos(t), np.sin(t)
    return mean + cos * TAU**2 / (cos**2 * TAU**2 + sin**2) * (x - cos * mean)


def velocity(mean: Array, x: Array, t: Array) -> Array:
    return (np.cos(t) * x - posterior(mean, x, t)) / np.sin(t)


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_any_denoiser_in_these_coordinates(case: Case) -> None:
    world, x = World(case), drawn()
    t = torch.tensor([0.1, 0.6, 1.1, 1.45], dtype=torch.float64)
    flow = TrigFlow.of(world.denoise, x)
    wanted = velocity(world.mean(STUDENT, world.cond), rows(x), t.numpy()[:, None])
    with world.roles.use(STUDENT):
        np.testing.assert_allclose(rows(flow.velocity(x, t, world.cond)), wanted, rtol=1e-6, atol=1e-8)
    sigma = torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    alpha = ratios(world, sigma.numpy())
    np.testing.assert_allclose(flow.angle(sigma).numpy(), np.arctan2(sigma.numpy(), alpha))


def test_a_discrete_model_is_told_every_time_between_two() -> None:
    """The inverse of its levels; at an index that index, and the denoiser's answers there are what they were."""
    schedule = VPSchedule.scaled_linear()
    between = ContinuousVP(schedule.alphas_cumprod)
    times = torch.tensor([0.0, 0.25, 17.5, 500.0, 998.9, 999.0], dtype=torch.float64)
    torch.testing.assert_close(between.time_of_sigma(schedule.sigma_of_time(times)), times, rtol=1e-9, atol=1e-9)
    world, x = World(CASES[0]), drawn()
    with torch.no_grad():
        ours = continuous(world.denoise)(x, world.sigma(), world.cond)
        torch.testing.assert_close(ours, world.denoise(x, world.sigma(), world.cond))
    flow = World(CASES[4])
    assert continuous(flow.denoise) is flow.denoise


# -- tangents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_differences_are_the_exact_tangent(case: Case) -> None:
    """To 1e-5 of forward mode in float64, and of the closed form."""
    world, x, dx = World(case), drawn(seed=1), drawn(seed=2)
    t = torch.tensor([0.2, 0.6, 1.0, 1.3], dtype=torch.float64)
    flow = TrigFlow.of(world.denoise, x)

    def answer(x: Tensor, t: Tensor) -> Tensor:
        return flow.velocity(x, t, world.cond)

    with torch.no_grad(), world.roles.use(STUDENT):
        exact = by_forward_mode(answer, x, t, dx)
        found = Differences(1e-3, 0.05, 1.45, rotated)(answer, x, t, dx)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    mean, h, at = world.mean(STUDENT, world.cond), 1e-5, t.numpy()[:, None]
    ends = [velocity(mean, rows(x) + step * rows(dx), at + step) for step in (h, -h)]
    np.testing.assert_allclose(rows(exact), (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-6)


def test_at_the_ends_the_difference_is_one_sided() -> None:
    """Nothing is asked beyond what the network was trained at."""
    asked: list[Tensor] = []

    def answer(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return expand(t, x) * x

    x, dx = drawn(seed=1), torch.zeros_like(drawn())
    found = Differences(0.01, 0.2, 1.4, straight_on)(
        answer, x, torch.tensor([0.2, 0.21, 1.0, 1.4], dtype=torch.float64), dx
    )
    assert float(torch.cat(asked).min()) == 0.2 and float(torch.cat(asked).max()) == 1.4
    # of t x along cos(h) x: x, but for h^2
    torch.testing.assert_close(found, x, rtol=0.03, atol=0.03)


def test_forward_mode_is_right_where_the_differences_are_too_coarse() -> None:
    """sin(300 t) turns by radians within a step of 0.01 t: a network's own time is an index up to 1000. A derivative
    that is lost is refused there as well."""
    x, dx = drawn(seed=1), drawn(seed=2)
    t = torch.tensor([0.2, 0.6, 1.0, 1.3], dtype=torch.float64)

    def answer(x: Tensor, t: Tensor) -> Tensor:
        return expand(torch.sin(300 * t), x) * x

    near = Differences(0.01, 0.05, 1.45, straight_on)
    wanted = expand(300 * torch.cos(300 * t), x) * x + expand(torch.sin(300 * t), x) * dx
    assert float((near(answer, x, t, dx) - wanted).norm() / wanted.norm()) > 0.5
    torch.testing.assert_close(Forward(near)(answer, x, t, dx), wanted)
    with pytest.raises(OneStepError, match="loses the derivative"):
        Forward(near)(lambda x, t: Silent.apply(answer(x, t)), x, t, dx)


# -- the loss ---------------------------------------------------------------------------------------------------------


def check(module: ModuleType, case: Case) -> None:
    world, batch, x0 = World(case), World(case).batch(), drawn(seed=1)
    learn = module.ContinuousConsistency(0.2, 0.8, TANGENT, 3.0, 0.05, 1.45)
    loss = learn(world.denoise, batch, x0, 0.7)
    loss.backward()
    t = learn.angles(batch).numpy()[:, None]
    x = np.cos(t) * rows(x0) + np.sin(t) * rows(batch.normal("angle's noise"))
    teacher = [velocity(world.mean(TEACHER, cond), x, t) for cond in (world.cond, world.cond.null_like(world.null))]
    dx = teacher[1] + 3 * (teacher[0] - teacher[1])
    mean = world.mean(STUDENT, world.cond)
    f, above, below = velocity(mean, x, t), np.minimum(t * 1.01, 1.45), np.maximum(t * 0.99, 0.05)
    ends = [velocity(mean, np.cos(at - t) * x + np.sin(at - t) * dx, at) for at in (above, below)]
    change = (ends[0] - ends[1]) / (above - below)
    g = -(np.cos(t) ** 2) * (f - dx) - 0.7 * np.cos(t) * np.sin(t) * (x + change)
    g = g / (np.sqrt((g**2).mean(1, keepdims=True)) + 0.1)
    assert float(loss.detach()) == pytest.approx((g**2).sum(1).mean(), rel=1e-5)
    # dF / dmean = -sin(t) / (cos^2 tau^2 + sin^2)
    world.check_gradient(-2 * g / 4 * -np.sin(t) / (np.cos(t) ** 2 * TAU**2 + np.sin(t) ** 2))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_forward_mode_through_a_network_with_adapters(prediction: str, tmp_path: Path) -> None:
    """A run by it ends near one by small differences; an operation without a forward mode is told, and one whose
    tangent is silently nothing is found out."""
    told = {"method": "scm", "steps": 3, "watch_every": 0, "preview_every": 0, "ema": 0.0}
    found = {
        tangent: run(tmp_path / tangent, small(**told, tangent=tangent, tangent_step=1e-3), host=SmallHost(prediction))
        for tangent in ("forward", "differences")
    }
    ours, theirs = (load_lora(found[name].path).state for name in ("forward", "differences"))
    for name, (a, b) in ours.items():
        theirs_a, theirs_b = theirs[name]
        near = theirs_b.flatten(1) @ theirs_a.flatten(1)
        torch.testing.assert_close(b.flatten(1) @ a.flatten(1), near, rtol=0.05, atol=1e-3)
    for wrong, words in ((Silent, "loses the derivative"), (Loud, "no forward mode")):
        host = SmallHost(prediction)
        host.network.blocks[0].register_forward_hook(lambda block, given, output, wrong=wrong: wrong.apply(output))
        with pytest.raises(OneStepError, match=f"{words}.*set tangent to differences"):
            run(tmp_path / wrong.__name__, small(**told, tangent="forward"), host=host)


class Silent(torch.autograd.Function):
    """An operation that drops its tangent, as a compiled one may."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return torch.zeros_like(tangent)


class Loud(torch.autograd.Function):
    """One that has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_the_loss_and_its_gradient_in_closed_form(case: Case) -> None:
    check(method, case)


def test_the_consistency_function_has_nothing_to_learn() -> None:
    """f(x, t) = mu + tau / sqrt(cos^2 tau^2 + sin^2) (x - cos mu) is constant on the Gaussian's trajectories; the
    teacher's own D is not."""
    x, mean = drawn(seed=1), drawn(seed=2)
    t = torch.tensor([0.2, 0.6, 1.0, 1.3], dtype=torch.float64)

    def of_map(x: Tensor, t: Tensor) -> Tensor:
        cos, sin = expand(torch.cos(t), x), expand(torch.sin(t), x)
        f = mean + TAU / torch.sqrt(cos**2 * TAU**2 + sin**2) * (x - cos * mean)
        return (cos * x - f) / sin

    def of_teacher(x: Tensor, t: Tensor) -> Tensor:
        return torch.from_numpy(velocity(rows(mean), rows(x), t.numpy()[:, None])).reshape(x.shape)

    dx, tangent = of_teacher(x, t), Differences(1e-3, 0.05, 1.45, rotated)
    for answer, least, most in ((of_map, 0.0, 1e-5), (of_teacher, 1e-2, 10.0)):
        g = method.consistency_gradient(x, t, answer(x, t), dx, tangent(answer, x, t, dx), 1.0)
        assert least <= float(g.flatten(1).norm(dim=1).min()) and float(g.abs().max()) < most


def test_the_gradient_is_cos_of_the_answers_change() -> None:
    """g = cos(t) d/dt D(x_t, t) along dx / dt, by finite differences of D itself."""
    world, x, dx = World(CASES[2]), drawn(seed=1), drawn(seed=2)
    t = torch.tensor([0.2, 0.6, 1.0, 1.3], dtype=torch.float64)
    flow = TrigFlow.of(world.denoise, x)
    with torch.no_grad(), world.roles.use(STUDENT):
        ends = [flow.x0(rotated(x, dx, h), t + h, world.cond) for h in (torch.full((4,), 1e-4).double(),)]
        ends += [flow.x0(rotated(x, dx, h), t + h, world.cond) for h in (torch.full((4,), -1e-4).double(),)]
        change = by_forward_mode(lambda x, t: flow.velocity(x, t, world.cond), x, t, dx)
        f = flow.velocity(x, t, world.cond)
    wanted = expand(torch.cos(t), x) * (ends[0] - ends[1]) / 2e-4
    torch.testing.assert_close(method.consistency_gradient(x, t, f, dx, change, 1.0), wanted, rtol=1e-4, atol=1e-6)


def test_no_number_teaches_nothing() -> None:
    g = torch.tensor([[1.0, float("nan")], [3.0, 4.0]])
    torch.testing.assert_close(method.normalised(g)[0], torch.zeros(2))
    torch.testing.assert_close(method.normalised(g)[1], g[1] / (12.5**0.5 + 0.1))


MUTANTS: dict[str, tuple[str, str]] = {
    "towards what changes": ("return -(cos**2) * (f - dx)", "return cos**2 * (f - dx)"),
    "no rotation": ("(x + change)", "change"),
    "the square of a sine": ("warmth * cos * sin", "warmth * sin * sin"),
    "cold": ("- warmth * cos", "- cos"),
    "not normalised": ("f.detach() + normalised(g)", "f.detach() + g"),
    "unguided": ("batch.nulls(), self.guidance)", "batch.nulls(), 1.0)"),
    "the student leads": ("denoise.roles.use(TEACHER)", "denoise.roles.use(STUDENT)"),
    "noise for the picture": ("expand(torch.cos(t), wide(x0)) * x0", "expand(torch.sin(t), wide(x0)) * x0"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_loss_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.scm", *change, monkeypatch)
    must_fail(lambda mutated: check(mutated, CASES[2]), module)
