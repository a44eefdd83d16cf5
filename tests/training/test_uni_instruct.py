"""Uni-Instruct: its gradient is that of the expanded divergence, by quadrature and in one graph; and what it reduces
to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from best_head import THREE, BestHead, best, looking_at
from doubled import ALPHA, PREDICTIONS, SIGMA, Doubled
from mutations import must_fail, mutant
from narrowed import narrowed, thinned
from oracles import TAU, At, Case, ExactBatch, World, drawn, rows
from small_host import SmallHost, small
from torch import Tensor, nn
from whole_runs import cancelled_and_whole, factors, newest, run

from onestep.core.cond import Cond
from onestep.core.denoiser import X0Denoiser
from onestep.core.roles import Roles
from onestep.core.schedule import FlowSchedule
from onestep.core.targets import Target
from onestep.core.tensor_file import read_tensors
from onestep.training.methods import expanded_divergence as method
from onestep.training.methods import settings_for
from onestep.training.methods.discriminator import Discriminator
from onestep.training.methods.distribution_matching import DistributionMatching
from onestep.training.methods.expanded_divergence import DIVERGENCES
from onestep.training.methods.f_divergence import BINS, Ratios
from onestep.training.methods.score_identity import ScoreIdentity
from onestep.training.methods.uni_instruct import uni_instruct

NUMBERS = {"reverse-kl": 1.4, "kl": 0.828402, "jensen-shannon": 0.412976, "chi-square": 2.100190 / 2}
"""dF / dm of q = N(0.7, 1.3) against p = N(0, 1), m the mean of q."""
ALPHA_S, SIGMA_S = 0.4, 0.6
F2: dict[str, Any] = {
    "reverse-kl": lambda r: np.ones_like(r),
    "kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "jensen-shannon": lambda r: r / (1 + r),
    "chi-square": lambda r: r**2,
}
"""r^2 f''(r)."""


# -- one number for each divergence -----------------------------------------------------------------------------------


class Line(nn.Module):
    """x0 = g x_s + (1 - g alpha) m of a Gaussian on a line, g and m of a role's own."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.shift = (nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return (self.slope(x.flatten(1)) + self.shift(cond.text[:, 0].to(x))).reshape(x.shape)


def gain(variance: float) -> float:
    """g = alpha tau^2 / v, v = alpha^2 tau^2 + sigma^2."""
    return (variance - SIGMA_S**2) / ALPHA_S / variance


def on_a_line(mean: float, variance: float) -> X0Denoiser:
    """Teacher p = N(0, 1) at the level, critic q = N(mean, variance)."""
    network = Line().requires_grad_(False)
    network.slope.weight.fill_(gain(1.0))
    network.shift.weight.zero_()
    roles = Roles([Target("slope", network.slope), Target("shift", network.shift)])
    roles.add("critic", 1, 0)
    one = torch.ones(1, 1, dtype=torch.float64)
    shift = (1 - gain(variance) * ALPHA_S) * mean / ALPHA_S
    roles._factors["critic"] = {
        "slope": (one.clone(), one * (gain(variance) - gain(1.0))),
        "shift": (one.clone(), one * shift),
    }
    roles.install()
    return X0Denoiser(network, FlowSchedule(), roles)


def density(x: Any, mean: float, variance: float) -> Any:
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


def divergence(name: str, mean: float, variance: float) -> float:
    """E_q[C |s_q - s_p|^2] on a grid."""
    x = np.linspace(-14, 14, 200001)
    q = density(x, mean, variance)
    y = -(x - mean) / variance + x
    return float(np.trapezoid(q * F2[name](density(x, 0.0, 1.0) / q) * y**2, x))


def check_number(module: ModuleType, name: str) -> None:
    """E[G] over x and noise by Gauss-Hermite quadrature, with an exact critic, the exact ratio and the weight 2 alpha^2
    / sigma^4: alpha dF / dm."""
    mean, variance, step = 0.7, 1.3, 1e-4
    nodes, weights = np.polynomial.hermite_e.hermegauss(48)
    a, b = (side.ravel() for side in np.meshgrid(nodes, nodes))
    each = np.outer(weights, weights).ravel() / (2 * np.pi)
    tau = np.sqrt(variance - SIGMA_S**2) / ALPHA_S
    x, noise = (torch.from_numpy(v).reshape(-1, 1, 1, 1) for v in (mean / ALPHA_S + tau * a, b))
    cond = Cond(torch.ones(len(x), 1, 1))
    batch = ExactBatch(cond, None, 0, 0, range(len(x)), (1, 1, 1), torch.device("cpu"))
    object.__setattr__(batch, "normal", lambda stream: noise)

    def ratio(scores: Any) -> Tensor:
        x_s = rows(scores.x_s)[:, 0]
        return torch.from_numpy(density(x_s, 0.0, 1.0) / density(x_s, mean, variance))

    terms = module.DIVERGENCES[name]
    w = 2 * ALPHA_S**2 / SIGMA_S**4
    made = DistributionMatching(
        guidance=1.0,
        levels=At(SIGMA_S),
        weight=lambda schedule, scores: torch.full((len(x),), w, dtype=torch.float64),
        ratio=lambda scores: terms.sim(ratio(scores)),
        jacobian=module.ExpandedDivergence(terms, ratio, torch.ones(1)),
    )
    g, _ = made.cotangent(on_a_line(mean, variance), batch, x)
    found = float((each * rows(g)[:, 0]).sum()) / ALPHA_S
    wanted = (divergence(name, mean + step, variance) - divergence(name, mean - step, variance)) / (2 * step)
    assert found == pytest.approx(wanted, rel=2e-6)
    assert name not in NUMBERS or wanted == pytest.approx(NUMBERS[name], rel=2e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_each_divergence_has_the_gradient_of_its_number(name: str) -> None:
    check_number(method, name)


# -- in one graph -----------------------------------------------------------------------------------------------------


def check_graph(module: ModuleType, name: str, folder: Path, prediction: str, k: float) -> None:
    """C (R - K) . (K - x) + (C - r C') |R - K|^2 / 2 of guided answers, and what has no graph beside it."""
    made = Doubled(folder, prediction)
    batch, x, terms = made.batch(), made.pictures(), module.DIVERGENCES[name]
    r, mean = torch.tensor([0.3, 1.0, 2.0, 0.7], dtype=torch.float64), torch.tensor([1.6])
    objective = DistributionMatching(
        guidance=k,
        levels=At(SIGMA),
        ratio=lambda scores: terms.sim(r) / 1.6,
        jacobian=module.ExpandedDivergence(terms, lambda scores: r, mean),
    )
    c = torch.from_numpy(F2[name](r.numpy()))
    first, second = r.clone().requires_grad_(), 0 * r
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(_c(name, first).sum(), first, create_graph=True)
        if slope.requires_grad:
            (second,) = torch.autograd.grad(slope.sum(), first)
    with made.hooked(True):
        found, _ = objective.cotangent(made.denoise, batch, x)
        free, sigma = x.clone().requires_grad_(), torch.full((4,), SIGMA, dtype=torch.float64)
        x_s = ALPHA[prediction] * free + SIGMA * batch.normal("match noise")
        real = made.guided("teacher", k, x_s, sigma, batch)
        fake = made.answer("critic", x_s, sigma, batch.cond)
        m = 1.6 * (free - real).detach().abs().mean((1, 2, 3))
        y = (fake - real).detach()
        inner = ((real - fake) * (fake - free)).sum((1, 2, 3))
        whole = c * inner + (c - r * slope.detach()) * (real - fake).square().sum((1, 2, 3)) / 2
        snr = (ALPHA[prediction] / SIGMA) ** 2
        push = r**2 * second * snr * y.square().sum((1, 2, 3)) / 2 * (y * free).sum((1, 2, 3))
        (wanted,) = torch.autograd.grad(((whole + push) / m).sum(), free)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-7 * float(wanted.abs().max()))


def _c(name: str, r: Tensor) -> Tensor:
    return {
        "reverse-kl": r * 0 + 1,
        "kl": r,
        "jeffreys": 1 + r,
        "jensen-shannon": r / (1 + r),
        "chi-square": r * r,
    }[name]


@pytest.mark.parametrize(("name", "prediction", "k"), thinned(7, DIVERGENCES, PREDICTIONS, [1.0, 3.0]))
def test_it_is_the_gradient_of_the_loss_in_one_graph(name: str, prediction: str, k: float, tmp_path: Path) -> None:
    check_graph(method, name, tmp_path, prediction, k)


# -- by the head's ratio ----------------------------------------------------------------------------------------------


def weighing(world: World, name: str, ratios: Ratios, k: float = 1.0) -> DistributionMatching:
    """The objective of a run, with the head at its best against what the critic draws."""

    def h(scores: Any) -> Tensor:
        return ratios(world.schedule, scores.sigma, scores.logit)

    return replace(
        uni_instruct(settings_for("uni-instruct", matching_guidance=k)),
        levels=At(world.case.sigma),
        judge=Discriminator(BestHead(world, fake="critic"), looking_at(world)),
        ratio=h,
        jacobian=method.expanded(name, ratios, world.denoise),
    )


@pytest.mark.parametrize("case", THREE, ids=str)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_ratio_is_the_heads(name: str, case: Case) -> None:
    """r = N(x_s; a m_T, V) / N(x_s; a m_F, V), brought to its bounds and means; both networks' Jacobians are g = a
    tau^2 / v, so that G = w C / E[C] (K - R)(1 - a g) + DI."""
    world, x = World(case), drawn()
    ratios = Ratios(name, 0.1, 20.0, 0.9, method.WEIGHTS)
    with torch.no_grad():
        ratios.ratio.copy_(torch.linspace(0.5, 3.0, BINS))
        ratios.weight.fill_(0.8)
    found, _ = weighing(world, name, ratios).cotangent(world.denoise, world.batch(), x)
    a, s = case.alpha, case.sigma
    x_s = a * rows(x) + s * rows(world.batch().normal("match noise"))
    time = float(world.schedule.share_of(torch.tensor([s], dtype=torch.float64)))
    r = np.clip(np.exp(best(world, x_s, fake="critic")), 0.1, 20) / np.linspace(0.5, 3.0, BINS)[int(BINS * time)]
    real, fake = (world.x0(role, x_s, world.cond) for role in ("teacher", "critic"))
    y, g = fake - real, a * TAU**2 / (a**2 * TAU**2 + s**2)
    w = 1 / np.abs(rows(x) - real).mean(1) / 0.8
    third = {"jensen-shannon": -2 * r**2 / (1 + r) ** 3, "chi-square": 2 * r**2}.get(name, 0 * r)
    push = third * (a / s) ** 2 * np.square(y).sum(1) / 2
    wanted = (w * (F2[name](r) * (1 - a * g) + push))[:, None] * y
    np.testing.assert_allclose(rows(found), wanted, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("case", THREE, ids=str)
def test_where_critic_and_teacher_agree_nothing_is_left(name: str, case: Case) -> None:
    world, x = World(case), drawn()
    for _, b in world.roles.state("critic").values():
        b.zero_()
    found, _ = weighing(world, name, Ratios(name, 0.1, 20.0, 0.9, method.WEIGHTS)).cotangent(
        world.denoise, world.batch(), x
    )
    assert float(found.abs().max()) <= 1e-12


def test_the_settings_reach_the_objective() -> None:
    told = settings_for("uni-instruct", matching_guidance=3.0, level_low=0.1, level_high=0.7, normaliser_floor=0.05)
    made = uni_instruct(told)
    assert (made.guidance, made.critic_guidance, made.taught) == (3.0, 1.0, 1.0)
    assert (made.levels.low, made.levels.high, made.weight.floor) == (0.1, 0.7, 0.05)  # type: ignore[attr-defined]
    assert told.own.divergence == "kl" and made.jacobian == ScoreIdentity(0.5)


# -- whole runs -------------------------------------------------------------------------------------------------------

LEARNING = {"gan_start": 0.0, "gan_ramp": 0.5, "gan_weight": 1.0, "head_learning_rate": 1e-2, "steps": 4}


@pytest.mark.parametrize("prediction", narrowed(["epsilon", "v_prediction", "flow"], "flow"))
def test_by_the_reverse_kl_it_is_sid_at_alpha_a_half(prediction: str, tmp_path: Path) -> None:
    """The gradient of every factor, without the discriminator's term and with a head that tells nothing yet; by another
    divergence it is not."""
    told = {"critic_updates": 2, "steps": 3, "learning_rate": 1e-4, "warm_start": 0, "critic_warm_up": 0}
    found = {}
    for name in ("reverse-kl", "kl"):
        made = Doubled(tmp_path / name, prediction, method="uni-instruct", divergence=name, gan_weight=0.0, **told)
        batch, turns = made.batch(), made.turns
        with made.hooked(False):
            turns.match(batch, 1.0, turns.first)
        found[name] = [f.grad.clone() for f in made.roles.parameters("student") if f.grad is not None]
    sid = Doubled(tmp_path / "sid", prediction, method="sid", alpha=0.5, **told)
    with sid.hooked(False):
        sid.turns.match(sid.batch(), 1.0, sid.turns.first)
    wanted = [f.grad for f in sid.roles.parameters("student") if f.grad is not None]
    for one, other in zip(found["reverse-kl"], wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert any(not torch.allclose(a, b) for a, b in zip(found["kl"], wanted, strict=True))


@pytest.mark.parametrize("poll", narrowed([20, 31]))
def test_a_run_that_is_stopped_ends_as_if_not(poll: int, tmp_path: Path) -> None:
    """With the means, which are of the state."""
    settings = small(method="uni-instruct", head_updates=2, **LEARNING)
    cut, whole = cancelled_and_whole(tmp_path, settings, poll)
    assert whole["files"] == cut["files"] and whole["metrics"] == cut["metrics"]
    state = read_tensors(newest(tmp_path / "cut" / "run") / "state.safetensors")
    assert bool((state["head/ratios.ratio"] != 1).any())


def test_divergences_learn_otherwise(tmp_path: Path) -> None:
    made = {
        name: factors(
            run(tmp_path / name, small(method="uni-instruct", divergence=name, **LEARNING), host=SmallHost("flow")).path
        )
        for name in ("kl", "reverse-kl")
    }
    assert made["kl"] != made["reverse-kl"]


# -- mutants ----------------------------------------------------------------------------------------------------------

MUTANTS = {
    "the critic's own part": ("c_fake = sim * (apart - (fake - scores.x))", "c_fake = -sim * (fake - scores.x)"),
    "from the teacher": ("c_real = sim * (fake - scores.x)", "c_real = sim * (real - scores.x)"),
    "FGM's sign": ("- fgm * apart\n", "+ fgm * apart\n"),
    "DI's sign": ("return pulled - 0.5 * di", "return pulled + 0.5 * di"),
    "DI not halved": ("return pulled - 0.5 * di", "return pulled - di"),
    "a mean for a sum": ("apart.square().flatten(1).sum(1)", "apart.square().flatten(1).mean(1)"),
    "no signal to noise": ("/ scores.sigma) ** 2, apart)", "/ scores.sigma) ** 0, apart)"),
    "not brought to mean 1": ("* w / cast_as(mean, w)", "* w"),
}
OF_NAME = {
    "kl": ('"kl": Expanded(lambda r: r, torch.zeros_like', '"kl": Expanded(lambda r: r, torch.ones_like'),
    "jeffreys": ("lambda r: 1 + r, torch.ones_like", "lambda r: 1 + r, torch.zeros_like"),
    "jensen-shannon": ("-2 * r**2 / (1 + r) ** 3", "2 * r**2 / (1 + r) ** 3"),
    "chi-square": ("lambda r: -(r**2)", "lambda r: r**2"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_gradient_is_found_out(
    change: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = mutant("onestep.training.methods.expanded_divergence", *change, monkeypatch)
    must_fail(lambda wrong: check_graph(wrong, "jensen-shannon", tmp_path, "flow", 3.0), module)


@pytest.mark.parametrize("name", OF_NAME)
def test_a_wrong_divergence_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.expanded_divergence", *OF_NAME[name], monkeypatch)
    must_fail(lambda wrong: check_number(wrong, name), module)
