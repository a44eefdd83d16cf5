"""Score identity: its gradient, one network after another, is that of its loss in one graph; and what is wrong is found
out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from doubled import ALPHA, PREDICTIONS, SIGMA, Doubled
from mutations import must_fail, mutant
from narrowed import thinned
from oracles import CASES, TAU, Array, At, Case, World, drawn, rows
from torch import Tensor

from onestep.training.methods import pull_back, score_identity
from onestep.training.methods.distribution_matching import DistributionMatching

KINDS = [(1.0, 1.0, 0.0), (3.0, 1.0, 0.0), (2.0, 2.0, 0.0), (1.0, 0.0, 0.0), (1.0, -1.0, 0.0), (3.0, 2.0, 0.7)]
"""Scales of teacher and critic, and how much of guidance is rescaled."""


def objective(alpha: float, kind: tuple[float, float, float], module: Any = score_identity) -> DistributionMatching:
    real, fake, rescale = kind
    made = module.ScoreIdentity(alpha)
    return DistributionMatching(guidance=real, critic_guidance=fake, rescale=rescale, levels=At(SIGMA), jacobian=made)


def rescaled(answer: Tensor, d_c: Tensor, phi: float) -> Tensor:
    """arXiv:2305.08891, Eq. 15 and 16."""
    of, to = (value.flatten(1).std(1)[:, None, None, None] for value in (answer, d_c))
    return phi * answer * to / of + (1 - phi) * answer


def loss_of(made: Doubled, x: Tensor, batch: Any, alpha: float, kind: tuple[float, float, float]) -> Tensor:
    """The sum of (R - K) . ((R - x) - alpha (R - K)) / m over all samples, in one graph."""
    real, fake, rescale = kind
    sigma = torch.full((4,), SIGMA, dtype=torch.float64)
    x_s = ALPHA[made.host.prediction] * x + SIGMA * batch.normal("match noise")
    sides = []
    for role, k in (("teacher", real), ("critic", fake)):
        answer = made.guided(role, k, x_s, sigma, batch)
        if rescale and k not in (0, 1):
            answer = rescaled(answer, made.answer(role, x_s, sigma, batch.cond), rescale)
        sides.append(answer)
    r, k = sides
    m = (x - r).detach().abs().mean((1, 2, 3), keepdim=True)
    return ((r - k) * ((r - x) - alpha * (r - k)) / m).sum()


@pytest.mark.parametrize(
    ("prediction", "checkpointing", "sliced", "alpha", "kind"),
    thinned(7, PREDICTIONS, [True, False], [True, False], [0.5, 1.0, 1.2], KINDS),
)
def test_it_is_the_gradient_of_the_loss_in_one_graph(
    prediction: str, checkpointing: bool, sliced: bool, alpha: float, kind: tuple[float, float, float], tmp_path: Path
) -> None:
    """To 1e-8 of its size, in float64; the networks' own weights and factors get none."""
    made = Doubled(tmp_path, prediction)
    batch, x = made.batch(sliced=sliced), made.pictures()
    with made.hooked(checkpointing):
        found, _ = objective(alpha, kind).cotangent(made.denoise, batch, x)
        free = x.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(loss_of(made, free, batch, alpha, kind), free)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8 * float(wanted.abs().max()))
    assert float(found.abs().max()) > 0.1 and not found.requires_grad
    assert all(factor.grad is None for role in ("student", "critic") for factor in made.roles.parameters(role))


@pytest.mark.parametrize("norm", [2, "row"])
def test_so_it_is_where_the_host_keeps_the_velocitys_norm(norm: Any, tmp_path: Path) -> None:
    """Guidance then reads x_s itself."""
    made = Doubled(tmp_path, "flow")
    made.denoise.token_norm = norm
    batch, x, alpha, k = made.batch(), made.pictures(), 1.2, 3.0
    sigma = torch.full((4,), SIGMA, dtype=torch.float64)

    def norms(v: Tensor) -> Tensor:
        if norm == "row":
            return v.square().sum(-1, keepdim=True).sqrt()
        tokens = v.reshape(4, 2, 2, 2, 2, 2).square().sum((1, 3, 5)).sqrt()
        return tokens.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]

    with made.hooked(False):
        found, _ = objective(alpha, (k, 1.0, 0.0)).cotangent(made.denoise, batch, x)
        free = x.clone().requires_grad_()
        x_s = 0.4 * free + SIGMA * batch.normal("match noise")
        d_c, fake = (made.answer(role, x_s, sigma, batch.cond) for role in ("teacher", "critic"))
        plain = made.guided("teacher", k, x_s, sigma, batch)
        real = x_s - norms(x_s - d_c) / norms(x_s - plain) * (x_s - plain)
        m = (free - real).detach().abs().mean((1, 2, 3), keepdim=True)
        loss = ((real - fake) * ((real - free) - alpha * (real - fake)) / m).sum()
        (wanted,) = torch.autograd.grad(loss, free)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8 * float(wanted.abs().max()))


# -- in closed form ---------------------------------------------------------------------------------------------------


def check_gaussian(make: Callable[..., DistributionMatching], case: Case) -> None:
    """Central differences of the loss written in NumPy, m held still: exact where D is linear in x_s."""
    world, x, alpha, k, k_f = World(case), drawn(), 0.8, 3.0, 2.0
    g, _ = replace(make(alpha, (k, k_f, 0.0)), levels=At(case.sigma)).cotangent(world.denoise, world.batch(), x)
    noise, null = rows(world.batch().normal("match noise")), world.null.repeat(4)

    def sides(value: Array) -> tuple[Array, Array]:
        x_s = case.alpha * value + case.sigma * noise
        both = []
        for role, scale in (("teacher", k), ("critic", k_f)):
            d_c, d_u = world.x0(role, x_s, world.cond), world.x0(role, x_s, null)
            both.append(d_u + scale * (d_c - d_u))
        return both[0], both[1]

    real, _ = sides(rows(x))
    m = np.abs(rows(x) - real).mean(1)

    def loss(value: Array) -> Array:
        r, f = sides(value)
        return ((r - f) * ((r - value) - alpha * (r - f))).sum(1) / m  # type: ignore[no-any-return]

    wanted = np.zeros_like(rows(x))
    for at in range(wanted.shape[1]):
        step = np.zeros_like(wanted)
        step[:, at] = 1e-3
        wanted[:, at] = (loss(rows(x) + step) - loss(rows(x) - step)) / 2e-3
    np.testing.assert_allclose(rows(g), wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_on_gaussians(case: Case) -> None:
    check_gaussian(objective, case)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("k", [1.0, 4.5])
def test_a_critic_that_is_the_teacher_leaves_nothing(case: Case, k: float) -> None:
    """Both under one guidance: R = K, and both Jacobians are the same."""
    world, x = World(case), drawn()
    for _, b in world.roles.state("critic").values():
        b.zero_()
    g, _ = objective(1.0, (k, k, 0.0)).cotangent(world.denoise, world.batch(), x)
    assert float(g.abs().max()) <= 1e-12


@pytest.mark.parametrize("case", [case for case in CASES if case.alpha > 0], ids=str)
def test_with_half_it_is_the_gradient_of_the_scores_distance(case: Case) -> None:
    """x = m_q + tau n, an exact critic, w = (alpha / sigma^2)^2: the score's distance is E|s_q - s_p|^2 = alpha^2
    |m_q - m_p|^2 / v^2 with v = alpha^2 tau^2 + sigma^2, whose gradient in the mean is E[2 G] at alpha 1 (the student's
    spread held still), to twelve places."""
    world = World(case)
    m_q, m_p = world.mean("critic", world.cond), world.mean("teacher", world.cond)
    x = torch.from_numpy(m_q).reshape(-1, 2, 2, 2) + TAU * drawn(seed=3)
    w = (case.alpha / case.sigma**2) ** 2
    made = replace(
        objective(1.0, (1.0, 1.0, 0.0)),
        levels=At(case.sigma),
        weight=lambda schedule, scores: torch.full((4,), w, dtype=torch.float64),
    )
    found = np.zeros_like(m_q)
    # of x and of the noise with both signs: what is linear in them falls out of the mean
    for sign in (1.0, -1.0):
        mirrored = torch.from_numpy(m_q).reshape(-1, 2, 2, 2) + sign * (x - torch.from_numpy(m_q).reshape(x.shape))
        batch = _signed(world, sign)
        g, _ = made.cotangent(world.denoise, batch, mirrored)
        found += rows(g) / 2
    v = case.alpha**2 * TAU**2 + case.sigma**2
    np.testing.assert_allclose(found, case.alpha**2 * (m_q - m_p) / v**2, rtol=1e-8, atol=1e-11)


def _signed(world: World, sign: float) -> Any:
    batch = world.batch()
    noise = batch.normal
    object.__setattr__(batch, "normal", lambda stream: sign * noise(stream))
    return batch


# -- mutants ----------------------------------------------------------------------------------------------------------

IDENTITY_MUTANTS = {
    "alpha not twice": ("(1 - 2 * self.alpha) * apart", "(1 - self.alpha) * apart"),
    "alpha not twice for the critic": ("2 * self.alpha * apart - to_real", "self.alpha * apart - to_real"),
    "the critic's sign": ("(2 * self.alpha * apart - to_real)", "(to_real - 2 * self.alpha * apart)"),
    "from the critic": ("real - fake, real - scores.x", "real - fake, fake - scores.x"),
    "no weight": ("w = expand(objective.weight(denoise.schedule, scores), apart)", "w = 1.0"),
    "branches exchanged": ("found[0], without: found[1]", "found[1], without: found[0]"),
    "sides exchanged": ("scores, c_real, c_fake)\n", "scores, c_fake, c_real)\n"),
}
PULL_MUTANTS = {
    "no chain factor": (" * total\n", "[:0].sum() + total\n"),
    "one role": ("denoise.roles.use(role, train=False)", 'denoise.roles.use("teacher", train=False)'),
    "one answer": ("total += found", "total = found"),
    "the level's own factor": ("denoise.schedule.alpha(scores.sigma), total", "scores.sigma, total"),
}


@pytest.mark.parametrize("change", IDENTITY_MUTANTS.values(), ids=list(IDENTITY_MUTANTS))
def test_a_wrong_loss_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = mutant("onestep.training.methods.score_identity", *change, monkeypatch)
    must_fail(lambda wrong: check_network(lambda *how: objective(*how, module=wrong), tmp_path), module)


def check_network(make: Any, folder: Path) -> None:
    """A case in which the two networks' Jacobians differ."""
    doubled, alpha, kind = Doubled(folder, "epsilon"), 1.2, (3.0, 1.0, 0.0)
    batch, x = doubled.batch(), doubled.pictures()
    with doubled.hooked(False):
        found, _ = make(alpha, kind).cotangent(doubled.denoise, batch, x)
        free = x.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(loss_of(doubled, free, batch, alpha, kind), free)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8 * float(wanted.abs().max()))


@pytest.mark.parametrize("change", PULL_MUTANTS.values(), ids=list(PULL_MUTANTS))
def test_a_wrong_product_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = mutant("onestep.training.methods.pull_back", *change, monkeypatch)

    def check(wrong: ModuleType) -> None:
        monkeypatch.setattr(score_identity, "pulled_back", wrong.pulled_back)
        check_network(objective, tmp_path)

    must_fail(check, module)
    monkeypatch.setattr(score_identity, "pulled_back", pull_back.pulled_back)
    check_network(objective, tmp_path)
