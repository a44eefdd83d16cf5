"""The engine's cotangent and its critic, in every parameterisation, against the Gaussian world in NumPy.

G = w (a (D_F - D_c) - (k - 1) (D_c - D_u)),   w = 1 / mean |x - D^k|     (arXiv:2311.18828, Eq. 7 and 8)
L_F = mean w_F(lambda) |D_F(x_s) - x|^2,       w_F = 1 + e^(2 lambda)
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from oracles import CASES, TAU, WIDTH, Array, At, Case, World, drawn, posterior_mean, rows, stable_diffusion_levels

from onestep.core.errors import OneStepError
from onestep.core.schedule import NoiseSchedule
from onestep.training.methods import distribution_matching as engine

MODULE = "onestep.training.methods.distribution_matching"
K, MATCHING = 3.5, 0.6


def elsewhere(case: Case) -> tuple[float, float]:
    """(alpha, sigma) of another level of the same schedule."""
    if "flow" in case.name:
        return 0.7, 0.3
    return stable_diffusion_levels(200, zero_terminal="zero" in case.name)


def noised(world: World, x: Array, stream: str, level: tuple[float, float] | None = None) -> Array:
    alpha, sigma = level or (world.case.alpha, world.case.sigma)
    return alpha * x + sigma * rows(world.batch().normal(stream))


def share(x: Array, real: Array) -> Array:
    """1 / mean_CHW |x - D_real| of each sample, arXiv:2311.18828, Eq. 8."""
    return 1 / np.abs(x - real).mean(1, keepdims=True)


def answers(world: World, x_s: Array, level: tuple[float, float] | None = None) -> tuple[Array, Array, Array]:
    """(D_c, D_u, D_F)."""
    alpha, sigma = level or (world.case.alpha, world.case.sigma)
    null = world.null.repeat(4)
    asked = [("teacher", world.cond), ("teacher", null), ("critic", world.cond)]
    d_c, d_u, d_f = (posterior_mean(x_s, alpha, sigma, world.mean(role, cond)) for role, cond in asked)
    return d_c, d_u, d_f


# -- the student's cotangent ------------------------------------------------------------------------------------------


def check_cotangent(module: ModuleType, case: Case) -> None:
    world, x = World(case), drawn()
    objective = module.DistributionMatching(guidance=K, matching=MATCHING, levels=At(case.sigma))
    g, scores = objective.cotangent(world.denoise, world.batch(), x)
    d_c, d_u, d_f = answers(world, noised(world, rows(x), "match noise"))
    wanted = share(rows(x), d_u + K * (d_c - d_u)) * (MATCHING * (d_f - d_c) - (K - 1) * (d_c - d_u))
    np.testing.assert_allclose(rows(g), wanted, rtol=1e-9, atol=1e-11)
    for found, answer in ((scores.real, d_c), (scores.null, d_u), (scores.fake, d_f)):
        np.testing.assert_allclose(rows(found), answer, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cotangent_in_closed_form(case: Case) -> None:
    check_cotangent(engine, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_critic_that_is_the_teacher_leaves_the_guidance_term_alone(case: Case) -> None:
    """The matching term is zero to 1e-12; and without guidance nothing is left at all."""
    world, x = World(case), drawn()
    for _, b in world.roles.state("critic").values():
        b.zero_()
    d_c, d_u, _ = answers(world, noised(world, rows(x), "match noise"))
    options = {"levels": At(case.sigma)}
    g, _ = engine.DistributionMatching(guidance=K, **options).cotangent(world.denoise, world.batch(), x)
    guidance = -share(rows(x), d_u + K * (d_c - d_u)) * (K - 1) * (d_c - d_u)
    np.testing.assert_allclose(rows(g), guidance, rtol=1e-9, atol=1e-11)
    alone, scores = engine.DistributionMatching(guidance=1.0, **options).cotangent(world.denoise, world.batch(), x)
    assert float(alone.abs().max()) <= 1e-12 and scores.null is None
    none, _ = engine.DistributionMatching(guidance=K, matching=0.0, **options).cotangent(
        world.denoise, world.batch(), x
    )
    np.testing.assert_allclose(rows(none), guidance, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_separate_levels(case: Case) -> None:
    """The guidance term at a level of its own, with its own noise and weight (arXiv:2511.22677)."""
    world, x, level = World(case), drawn(), elsewhere(case)
    objective = engine.DistributionMatching(
        guidance=K, matching=MATCHING, levels=At(case.sigma), guidance_levels=At(level[1])
    )
    g, _ = objective.cotangent(world.denoise, world.batch(), x)
    d_c, _, d_f = answers(world, noised(world, rows(x), "match noise"))
    wanted = MATCHING * share(rows(x), d_c) * (d_f - d_c)
    d_c, d_u, _ = answers(world, noised(world, rows(x), "guide noise", level), level)
    wanted = wanted - share(rows(x), d_u + K * (d_c - d_u)) * (K - 1) * (d_c - d_u)
    np.testing.assert_allclose(rows(g), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_critics_own_guidance(case: Case) -> None:
    """PG-SB and VSD guide both sides: D_F^k' - D_R^k."""
    world, x, k_f = World(case), drawn(), 2.0
    objective = engine.DistributionMatching(guidance=K, critic_guidance=k_f, levels=At(case.sigma))
    g, _ = objective.cotangent(world.denoise, world.batch(), x)
    x_s = noised(world, rows(x), "match noise")
    d_c, d_u, d_f = answers(world, x_s)
    d_fu = world.x0("critic", x_s, world.null.repeat(4))
    real, fake = d_u + K * (d_c - d_u), d_fu + k_f * (d_f - d_fu)
    np.testing.assert_allclose(rows(g), share(rows(x), real) * (fake - real), rtol=1e-9, atol=1e-10)


def test_the_plug_ins_are_asked() -> None:
    """A ratio multiplies the weighted difference, a Jacobian term is added, a renoising kernel makes x_s."""
    world, x = World(CASES[4]), drawn()
    plain, scores = engine.DistributionMatching(guidance=1.0, levels=At(0.6)).cotangent(world.denoise, world.batch(), x)
    assert scores.fake is not None
    ratio = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    made, _ = engine.DistributionMatching(
        guidance=1.0,
        levels=At(0.6),
        ratio=lambda scores: ratio,
        jacobian=lambda made, denoise, batch, scores: torch.full_like(scores.x, 7.0),
    ).cotangent(world.denoise, world.batch(), x)
    torch.testing.assert_close(made, plain * ratio[:, None, None, None] + 7)
    seen: list[torch.Tensor] = []

    def still(schedule: NoiseSchedule, x: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(sigma)
        return x

    _, scores = engine.DistributionMatching(guidance=1.0, levels=At(0.6), renoise=still).cotangent(
        world.denoise, world.batch(), x
    )
    assert torch.equal(scores.x_s, x) and seen[0].tolist() == [0.6] * 4


def test_the_weight_has_a_ceiling() -> None:
    """Where x is the teacher's answer the normaliser is 0: the weight stays at 1e5."""
    x = drawn()
    scores = engine.Scores(x, x, torch.ones(4), real=x + 1e-9, fake=x)
    weight = engine.dmd_weight(World(CASES[0]).schedule, scores)
    torch.testing.assert_close(weight, torch.full((4,), 1e5, dtype=torch.float64))


def test_the_cotangent_has_no_graph_and_costs_two_forwards() -> None:
    """Teacher and critic share one forward of three rows a sample; separate levels take a second one."""
    world, x, sizes = World(CASES[0]), drawn().requires_grad_(), []
    world.network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for apart in (None, At(0.4)):
        objective = engine.DistributionMatching(guidance=K, levels=At(0.5), guidance_levels=apart)
        g, scores = objective.cotangent(world.denoise, world.batch(), x)
        assert not g.requires_grad and not scores.real.requires_grad
    assert sizes == [12, 8, 8]
    assert all(factor.grad is None for role in ("student", "critic") for factor in world.roles.parameters(role))


def test_guidance_needs_a_null() -> None:
    world = World(CASES[0])
    with pytest.raises(OneStepError, match="no trained null condition.*set matching_guidance to 1"):
        engine.DistributionMatching(guidance=K).cotangent(world.denoise, world.batch(null=False), drawn())
    engine.DistributionMatching(guidance=1.0).cotangent(world.denoise, world.batch(null=False), drawn())


# -- the critic -------------------------------------------------------------------------------------------------------


def critic_in_numpy(world: World, x: Array, cond_rows: Array) -> tuple[float, Array, Array]:
    """(L_F, dL/dA, dL/dB): D_F depends on its mean by sigma^2 / (alpha^2 tau^2 + sigma^2)."""
    alpha, sigma = world.case.alpha, world.case.sigma
    variance = alpha**2 * TAU**2 + sigma**2
    mean = cond_rows @ world.weight("critic").T
    error = posterior_mean(noised(world, x, "critic noise"), alpha, sigma, mean) - x
    weight = 1 + (alpha / sigma) ** 2
    d_mean = weight * 2 * error * (sigma**2 / variance) / error.size
    a, b = (factor.numpy().astype(np.float64) for factor in world.roles.state("critic")["mean"])
    d_weight = d_mean.T @ cond_rows
    return float(weight * (error**2).mean()), b.T @ d_weight, d_weight @ a.T


def check_critic(module: ModuleType, case: Case) -> None:
    world, x = World(case), drawn().requires_grad_()
    objective = module.DistributionMatching(critic_levels=At(case.sigma))
    loss = objective.critic_loss(world.denoise, world.batch(), x)
    loss.backward()
    wanted, d_a, d_b = critic_in_numpy(world, rows(x), world.cond.text[:, 0].double().numpy())
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-10)
    a, b = world.roles.parameters("critic")
    assert a.grad is not None and b.grad is not None
    np.testing.assert_allclose(a.grad.numpy(), d_a, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(b.grad.numpy(), d_b, rtol=1e-5, atol=1e-6)
    assert x.grad is None and all(factor.grad is None for factor in world.roles.parameters("student"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_critics_loss_and_gradient_in_closed_form(case: Case) -> None:
    check_critic(engine, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_critics_gradient_is_the_finite_difference(case: Case) -> None:
    world, x = World(case), drawn()
    factors = world.double_factors("critic")
    objective = engine.DistributionMatching(critic_levels=At(case.sigma))
    objective.critic_loss(world.denoise, world.batch(), x).backward()
    directions = [torch.randn(factor.shape, dtype=torch.float64) for factor in factors]
    slope = sum(float((f.grad * d).sum()) for f, d in zip(factors, directions, strict=True))  # type: ignore[operator]
    losses = []
    for step in (1e-5, -2e-5):
        for factor, direction in zip(factors, directions, strict=True):
            factor.detach().add_(step * direction)
        losses.append(float(objective.critic_loss(world.denoise, world.batch(), x).detach()))
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-7)


def test_the_critic_learns_the_null_where_the_draw_says_so() -> None:
    """A share of the samples, the same ones whatever the micro-batch."""
    world, x = World(CASES[4]), drawn()
    objective = engine.DistributionMatching(critic_levels=At(0.6), null_rate=0.5)
    gone = (world.batch().uniform("critic null") < 0.5).numpy()
    assert 0 < gone.sum() < 4, "the draw of this seed mixes"
    cond_rows = np.where(gone[:, None], world.null.text[:, 0].double().numpy(), world.cond.text[:, 0].double().numpy())
    wanted, _, _ = critic_in_numpy(world, rows(x), cond_rows)
    loss = objective.critic_loss(world.denoise, world.batch(), x)
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-10)
    whole = engine.DistributionMatching(critic_levels=At(0.6), null_rate=0.5)
    assert float(whole.critic_loss(world.denoise, world.batch(null=False), x).detach()) != pytest.approx(wanted)


def test_an_exact_critic_is_a_minimum() -> None:
    """x drawn from the critic's own Gaussian: the expected gradient in its mean is 0, within four standard errors."""
    world = World(CASES[0])
    cond = world.cond[torch.zeros(4000, dtype=torch.long)]
    batch = world.batch(cond=cond)
    mean = torch.from_numpy(world.mean("critic", cond)).reshape(-1, 2, 2, 2)
    x = mean + TAU * batch.normal("pictures")
    loss = engine.DistributionMatching(critic_levels=At(CASES[0].sigma)).critic_loss(world.denoise, batch, x)
    loss.backward()
    for factor in world.roles.parameters("critic"):
        assert factor.grad is not None and float(factor.grad.abs().max()) < 4 * 2 / np.sqrt(4000 * WIDTH) * 3


# -- the divergence goes down -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.alpha > 0], ids=str)
def test_the_cotangent_is_the_gradient_of_the_divergence(case: Case) -> None:
    """With w = alpha^2 / sigma^2 (and the critic exact) E[G] is d KL(q_s || p_s) / d mean, to twelve places.

    Two Gaussians of variance v = alpha^2 tau^2 + sigma^2: KL = alpha^2 |m_q - m_p|^2 / (2 v).
    """
    world = World(case)
    m_q, m_p = world.mean("critic", world.cond), world.mean("teacher", world.cond)
    batch = world.batch()
    x = torch.from_numpy(m_q).reshape(-1, 2, 2, 2) + TAU * batch.normal("pictures")
    weight = (case.alpha / case.sigma) ** 2
    objective = engine.DistributionMatching(
        guidance=1.0,
        levels=At(case.sigma),
        weight=lambda schedule, scores: torch.full((4,), weight, dtype=torch.float64),
    )
    g, _ = objective.cotangent(world.denoise, batch, x)
    variance = case.alpha**2 * TAU**2 + case.sigma**2
    np.testing.assert_allclose(rows(g), case.alpha**2 * (m_q - m_p) / variance, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("case", [case for case in CASES if case.alpha > 0], ids=str)
def test_a_step_lowers_the_divergence(case: Case) -> None:
    """With DMD's own weight too: every sample's mean moves towards the teacher's."""
    world = World(case)
    m_q, m_p = world.mean("critic", world.cond), world.mean("teacher", world.cond)
    x = torch.from_numpy(m_q).reshape(-1, 2, 2, 2) + TAU * world.batch().normal("pictures")
    g, _ = engine.DistributionMatching(guidance=1.0, levels=At(case.sigma)).cotangent(world.denoise, world.batch(), x)
    moved = m_q - 0.1 * rows(g)
    assert (np.square(moved - m_p).sum(1) < np.square(m_q - m_p).sum(1)).all()


# -- mutants ----------------------------------------------------------------------------------------------------------

REAL = 'asked = [(self.teacher, "real", batch.of_teacher)]'
FAKE = 'asked.append((CRITIC, "fake", batch.cond))'
COTANGENT_MUTANTS = {
    "the matching term's sign": ("delta = scores.fake - scores.real", "delta = scores.real - scores.fake"),
    "the guidance term's sign": ("-added(", "added("),
    "another scale": (
        "scale_of(self.guidance, batch)\n        return self",
        "1 + scale_of(1.0, batch)\n        return self",
    ),
    "guidance towards the null": ("-added(scores.real, scores.null", "-added(scores.null, scores.real"),
    "a teacher in the critic's place": (FAKE, FAKE.replace("CRITIC", "TEACHER")),
    "a critic in the teacher's place": (REAL, REAL.replace("self.teacher", "CRITIC")),
    "half the weight": ("return 1 / (scores.x - real)", "return 0.5 / (scores.x - real)"),
    "the weight of plain guidance": (
        "real = scores.real if scores.guided is None else scores.guided",
        "real = scores.real",
    ),
    "a sum for a mean": (".abs().flatten(1).mean(1).clamp_min", ".abs().flatten(1).sum(1).clamp_min"),
    "the matching weight left out": ("g = self.matching * self._match", "g = 1.0 * self._match"),
    "the null as condition": (FAKE, FAKE.replace("batch.cond", "self._nulls(batch)")),
    "other noise": ('batch.normal(f"{stream} noise")', 'batch.normal("noise")'),
}
CRITIC_MUTANTS = {
    "half the loss": ("return weighed.mean()", "return 0.5 * weighed.mean()"),
    "no weight": ("cast_as(at(self.critic_weight, denoise.schedule, sigma), error) * error", "error"),
    "a sum for a mean": (".square().flatten(1).mean(1)", ".square().flatten(1).sum(1)"),
    "the teacher trained": ("with denoise.roles.use(CRITIC):", "with denoise.roles.use(TEACHER):"),
    "the noised target": ("left = answer - x if", "left = answer - x_s if"),
    "clean input": (
        "answer = self._taught(denoise, batch, x_s, sigma, later)",
        "answer = self._taught(denoise, batch, x, sigma, later)",
    ),
    "a graph into the student": ("x, noise = x.detach(), batch", "x, noise = x * 1, batch"),
}


@pytest.mark.parametrize("change", COTANGENT_MUTANTS.values(), ids=list(COTANGENT_MUTANTS))
def test_a_wrong_cotangent_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    must_fail(lambda module: check_cotangent(module, CASES[4]), mutant(MODULE, *change, monkeypatch))


@pytest.mark.parametrize("change", CRITIC_MUTANTS.values(), ids=list(CRITIC_MUTANTS))
def test_a_wrong_critic_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    must_fail(lambda module: check_critic(module, CASES[4]), mutant(MODULE, *change, monkeypatch))
