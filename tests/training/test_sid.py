"""SiD as its settings make it: strategies of guidance, the critic under them, whole runs, what they cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from allocated import host as unet
from allocated import trained
from doubled import ALPHA, PREDICTIONS, Doubled
from mutations import must_fail, mutant
from narrowed import narrowed
from oracles import CASES, At, Case, World, drawn, levels_in_numpy, rows
from quantised_layers import stored
from small_host import SmallHost, small
from torch import nn
from whole_runs import cancelled_and_whole, run

from onestep.core.cond import Cond
from onestep.core.denoiser import FlowDenoiser
from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.core.recomputed import BLOCKS, NOTHING
from onestep.core.roles import Roles
from onestep.core.schedule import FlowSchedule
from onestep.core.targets import Target
from onestep.training.engine.batch import Batch
from onestep.training.engine.levels import UniformTime
from onestep.training.engine.student import generate
from onestep.training.methods import METHODS, settings_for
from onestep.training.methods import distribution_matching as engine
from onestep.training.methods import sim as sim_method
from onestep.training.methods.distribution_matching import DistributionMatching, DmdWeight
from onestep.training.methods.guidance_strategy import STRATEGIES
from onestep.training.methods.score_identity import ScoreIdentity
from onestep.training.methods.sid import sid
from onestep.training.methods.sid_lsg import sid_lsg
from onestep.training.methods.sim import sim

BY_IDENTITY = [name for name in METHODS if "guidance_strategy" in METHODS[name].settings.__dataclass_fields__]
"""The methods of this kind."""


def of(method: str) -> Any:
    """Its objective, from settings."""
    found = {"sid": sid, "sid-lsg": sid_lsg, "sim": sim}
    return found[method]


# -- what the settings make -------------------------------------------------------------------------------------------


def test_the_settings_reach_the_objective() -> None:
    common: dict[str, Any] = {"levels": UniformTime(0.1, 0.7), "weight": DmdWeight(0.05), "rescale": 0.3}
    told = {"level_low": 0.1, "level_high": 0.7, "normaliser_floor": 0.05, "guidance_rescale": 0.3}
    wanted = {
        # k of the teacher, of the critic as it is asked, as it learns, and how often it learns the null
        "teacher": (3.0, 1.0, 1.0, 0.0),
        "long-short": (3.0, 3.0, 3.0, 0.1),
        "zero-cfg": (1.0, 0.0, 0.0, 0.0),
        "anti-cfg": (1.0, -2.0, -2.0, 0.1),
    }
    assert wanted.keys() == set(STRATEGIES)
    for strategy, (k, asked, taught, null_rate) in wanted.items():
        own = {"guidance_strategy": strategy, "matching_guidance": 3.0, "anti_guidance": -2.0, "alpha": 1.2}
        assert sid(settings_for("sid", **own, **told)) == DistributionMatching(
            guidance=k,
            critic_guidance=asked,
            taught=taught,
            null_rate=null_rate,
            jacobian=ScoreIdentity(1.2),
            **common,
        )
    assert METHODS["sid"].settings().alpha == 1.0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lsg_is_sid_under_long_and_short_guidance(strategy: str) -> None:
    told = {"guidance_strategy": strategy, "matching_guidance": 2.5, "level_high": 0.8}
    assert sid_lsg(settings_for("sid-lsg", **told)) == sid(settings_for("sid", **told))
    own = METHODS["sid-lsg"].settings()
    assert (own.guidance_strategy, own.matching_guidance) == ("long-short", 2.0)
    assert sid_lsg(settings_for("sid-lsg")).jacobian == ScoreIdentity(1.0)
    assert sid_lsg(settings_for("sid-lsg", normaliser_floor=0.1)).weight == DmdWeight(0.1)


def test_settings_of_two_terms_are_none_of_one() -> None:
    for name in ("separate_levels", "matching_weight"):
        with pytest.raises(OneStepError, match=f"sid has no setting '{name}': it belongs to dmd"):
            settings_for("sid", **{name: 0.5})


def test_an_unguided_teacher_is_told_of_and_needs_a_null() -> None:
    for strategy in STRATEGIES:
        settings = settings_for("sid", guidance_strategy=strategy, matching_guidance=3.0)
        unused = strategy in ("zero-cfg", "anti-cfg")
        assert ("matching_guidance 3 is not used" in METHODS["sid"].note(settings)) is unused
    host = SmallHost()
    host.denoiser.guidance = "embedded"
    for strategy in ("zero-cfg", "anti-cfg"):
        with pytest.raises(OneStepError, match=f"no trained null condition.*{strategy}.*guidance_strategy to teacher"):
            METHODS["sid"].check(host, settings_for("sid", guidance_strategy=strategy))
    METHODS["sid"].check(host, settings_for("sid", matching_guidance=1.0))


# -- the critic under guidance ----------------------------------------------------------------------------------------


def check_critic(module: ModuleType, case: Case, k: float, sliced: bool, by_branch: bool = False) -> None:
    """Its loss is the squared error of D_u + k (D_c - D_u), in NumPy; its gradient the finite difference."""
    later: list[Any] = []
    world, x = World(case), drawn()
    factors = world.double_factors("critic")
    batch = world.batch()
    object.__setattr__(batch, "sliced", sliced)
    made = module.DistributionMatching(critic_levels=At(case.sigma), taught=k)
    loss = made.critic_loss(world.denoise, batch, x, later if by_branch else None)
    loss.backward()
    assert len(later) == (by_branch and k != 0)
    for branch in later:
        branch.backward()
    x_s = case.alpha * rows(x) + case.sigma * rows(batch.normal("critic noise"))
    d_c, d_u = (world.x0("critic", x_s, cond) for cond in (world.cond, world.null.repeat(4)))
    weight = 1 + (case.alpha / case.sigma) ** 2
    assert float(loss.detach()) == pytest.approx(
        weight * float(np.square(d_u + k * (d_c - d_u) - rows(x)).mean()), rel=1e-9
    )
    directions = [torch.randn(f.shape, generator=torch.Generator().manual_seed(1)).double() for f in factors]
    slope = sum(float((f.grad * d).sum()) for f, d in zip(factors, directions, strict=True))  # type: ignore[operator]
    losses = []
    for step in (1e-5, -2e-5):
        for factor, direction in zip(factors, directions, strict=True):
            factor.detach().add_(step * direction)
        losses.append(float(made.critic_loss(world.denoise, batch, x).detach()))
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("k", [0.0, -1.0, 3.0])
@pytest.mark.parametrize(("sliced", "by_branch"), [(True, False), (False, False), (True, True)])
def test_the_critic_learns_under_guidance(case: Case, k: float, sliced: bool, by_branch: bool) -> None:
    check_critic(engine, case, k, sliced, by_branch)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_branch_at_a_time_is_the_same_gradient(case: Case, rescale: float) -> None:
    """And no two graphs are there at once: the first branch has one when the second one's is gone."""
    found, asked = [], []
    for by_branch in (False, True):
        world, later = World(case), []
        factors, batch = world.double_factors("critic"), replace(world.batch(), sliced=True)
        made = engine.DistributionMatching(critic_levels=At(case.sigma), taught=3.0, rescale=rescale)
        asked.clear()
        world.network.register_forward_pre_hook(lambda module, args: asked.append((args[2], torch.is_grad_enabled())))
        (0.5 * made.critic_loss(world.denoise, batch, drawn(), later if by_branch else None)).backward()
        for branch in later:
            branch.backward()
        found.append([factor.grad.clone() for factor in factors if factor.grad is not None])
    assert [graph for _, graph in asked] == [False, True, True] and torch.equal(asked[0][0].text, asked[2][0].text)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_without_a_prompt_it_is_asked_the_null_alone() -> None:
    """zero-cfg: teacher with the prompt, critic without; two forwards of a sample, and two with a graph."""
    world, x, asked = World(CASES[2]), drawn(), []
    world.network.register_forward_pre_hook(lambda module, args: asked.append((args[2].text, torch.is_grad_enabled())))
    made = sid(settings_for("sid", guidance_strategy="zero-cfg"))
    made.cotangent(world.denoise, world.batch(), x)
    cond, null = world.cond.text, world.null.repeat(4).text
    wanted = [(torch.cat([cond, null]), False), (cond, True), (null, True)]
    assert len(asked) == 3
    for (found, graph), (text, grad) in zip(asked, wanted, strict=True):
        assert torch.equal(found, text) and graph is grad
    asked.clear()
    made.critic_loss(world.denoise, world.batch(), x)
    assert len(asked) == 1 and torch.equal(asked[0][0], null)


CRITIC_MUTANTS = {
    "unguided": ("        if self.taught == 1:\n", "        if True:\n"),
    "the null with the prompt": (
        "            return denoise(x_s, sigma, nulls)",
        "            return denoise(x_s, sigma, batch.cond)",
    ),
    "another scale": ("scale_of(self.taught, batch), self.rescale", "scale_of(2.0, batch), self.rescale"),
    "branches exchanged": ("d_c, d_u = both.chunk(2)", "d_u, d_c = both.chunk(2)"),
}


@pytest.mark.parametrize("change", CRITIC_MUTANTS.values(), ids=list(CRITIC_MUTANTS))
def test_a_wrong_critic_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def check(module: ModuleType) -> None:
        for k in (0.0, 3.0):
            check_critic(module, CASES[4], k, False)

    must_fail(check, mutant("onestep.training.methods.distribution_matching", *change, monkeypatch))


# -- the student's turn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_turn_is_the_gradient_of_the_summed_loss(prediction: str, checkpointing: bool, tmp_path: Path) -> None:
    """Through student, teacher and critic in one graph, to 1e-8 of its size in float64: every factor."""
    made = Doubled(tmp_path, prediction, method="sid", alpha=1.2, matching_guidance=3.0, start=0.6)
    batch, turns = made.batch(), made.turns
    factors = made.roles.parameters("student")
    with made.hooked(checkpointing):
        turns.match(batch, 0.5, turns.first)
        found = [factor.grad.clone() for factor in factors if factor.grad is not None]
        x = generate(made.denoise, made.setup.recipe, batch)
        sigma = turns.at(turns.first, turns.simulate(batch)).levels(made.denoise.schedule, batch.uniform("match level"))
        alpha = (1 - sigma**2).sqrt() if ALPHA[prediction] == 0.8 else 1 - sigma
        wide = (slice(None), None, None, None)
        x_s = alpha[wide] * x + sigma[wide] * batch.normal("match noise")
        real, fake = made.guided("teacher", 3.0, x_s, sigma, batch), made.guided("critic", 1.0, x_s, sigma, batch)
        m = (x - real).detach().abs().mean((1, 2, 3), keepdim=True)
        loss = ((real - fake) * ((real - x) - 1.2 * (real - fake)) / m).sum() / 4
        wanted = torch.autograd.grad(0.5 * loss, factors)
    largest = max(float(g.abs().max()) for g in wanted)
    assert len(found) == len(wanted) and largest > 1e-3
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8 * largest)
    assert all(factor.grad is None for factor in made.roles.parameters("critic"))


def check_descent(method: str, case: Case, **own: Any) -> None:
    """From pure noise a student's picture is its mean; with an exact critic descent brings it to the teacher's: the
    divergence of what they draw, at every level."""
    world = World(case)
    world.roles.copy("student", "critic")
    recipe = Recipe.for_student(world.schedule, 1, "unet", ())
    made, gaps = of(method)(settings_for(method, matching_guidance=1.0, **own)), []
    for step in range(60):
        batch = world.batch(step=step)
        x = generate(world.denoise, recipe, batch)
        gaps.append(float(np.square(world.mean("student", world.cond) - world.mean("teacher", world.cond)).sum()))
        g, _ = made.cotangent(world.denoise, batch, x)
        x.backward(g / len(batch))
        for factor in world.roles.parameters("student"):
            assert factor.grad is not None
            factor.detach().sub_(0.05 * factor.grad)
            factor.grad = None
        world.roles.lerp("critic", "student", 1.0)
    assert gaps[-1] < 0.1 * gaps[0], gaps


@pytest.mark.parametrize("case", [CASES[5], CASES[6]], ids=str)
@pytest.mark.parametrize("method", ["sid", "sid-lsg", "sim"])
def test_descent_brings_the_student_to_its_teacher(method: str, case: Case) -> None:
    check_descent(method, case, guidance_strategy="teacher")


# -- SIM --------------------------------------------------------------------------------------------------------------


def check_sim(module: ModuleType, case: Case, strategy: str) -> None:
    """It is SiD at alpha 1 up to its normaliser: G m = G_sim sqrt(|R - K|^2 + c^2), sample by sample, c^2 = (share)^2
    n."""
    world, x, told = World(case), drawn(), {"guidance_strategy": strategy, "matching_guidance": 3.0}
    assert module.sim(settings_for("sim", **told)).jacobian == ScoreIdentity(1.0)
    g_sim, scores = module.sim(settings_for("sim", huber=0.3, **told)).cotangent(world.denoise, world.batch(), x)
    g_sid, _ = sid(settings_for("sid", alpha=1.0, **told)).cotangent(world.denoise, world.batch(), x)
    alpha, sigma = levels_in_numpy(case, world.batch().uniform("match level").numpy())
    x_s = alpha * rows(x) + sigma * rows(world.batch().normal("match noise"))
    scales = {"teacher": (3.0, 1.0), "long-short": (3.0, 3.0), "zero-cfg": (1.0, 0.0), "anti-cfg": (1.0, -1.0)}
    sides = []
    for role, k in zip(("teacher", "critic"), scales[strategy], strict=True):
        d_c, d_u = (world.x0(role, x_s, cond, alpha, sigma) for cond in (world.cond, world.null.repeat(4)))
        sides.append(d_u + k * (d_c - d_u))
    m = np.abs(rows(x) - sides[0]).mean(1)
    norm = np.sqrt(np.square(sides[0] - sides[1]).sum(1) + 0.3**2 * rows(x).shape[1])
    np.testing.assert_allclose(rows(g_sim) * norm[:, None], rows(g_sid) * m[:, None], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sim_is_sid_at_alpha_1_up_to_its_normaliser(case: Case, strategy: str) -> None:
    check_sim(sim_method, case, strategy)


SIM_MUTANTS = {
    "the mean for the sum": ("apart.square().sum(1)", "apart.square().mean(1)"),
    "the constant without its root": ("self.share**2 * apart.shape[1]", "self.share**2"),
    "its square": (".rsqrt()", ".reciprocal()"),
    "another alpha": ("score_identity(settings, along, 1.0", "score_identity(settings, along, 1.2"),
    "the critic unguided": ("real, fake = scores.sides", "real, fake = scores.sides[0], scores.fake"),
}


@pytest.mark.parametrize("change", SIM_MUTANTS.values(), ids=list(SIM_MUTANTS))
def test_a_wrong_sim_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.sim", *change, monkeypatch)
    must_fail(lambda wrong: check_sim(wrong, CASES[2], "long-short"), module)


# -- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.broad
@pytest.mark.parametrize("recompute", [BLOCKS, NOTHING])
def test_it_takes_no_more_memory_than_dmd(recompute: str, tmp_path: Path) -> None:
    """An update of both roles, as torch's allocator sees it."""
    few = {"sizes": "64x64", "rank": 8, "batch": 3, "pairs": 3, "steps": 4, "teacher_steps": 1, "watch_samples": 4}
    few |= {"warm_start": 0, "critic_warm_up": 0, "critic_updates": 1, "anchor": 0.0}
    real = unet()
    dmd, found = (
        trained(real, settings_for(method, **few), tmp_path / method, recompute, True) for method in ("dmd", "sid")
    )
    assert found <= 1.01 * dmd


# -- whole runs -------------------------------------------------------------------------------------------------------

RUNS = [
    ("sid", "teacher", 20),
    ("sid", "zero-cfg", 17),
    ("sid", "anti-cfg", 24),
    ("sid", "long-short", 13),
    ("sim", "teacher", 15),
    ("sid-lsg", "long-short", 22),
]


@pytest.mark.parametrize(("method", "strategy", "poll"), narrowed(RUNS))
def test_a_run_that_is_stopped_ends_as_if_not(method: str, strategy: str, poll: int, tmp_path: Path) -> None:
    settings = small(method=method, guidance_strategy=strategy, student_steps=2)
    cut, whole = cancelled_and_whole(tmp_path, settings, poll)
    assert whole["files"] == cut["files"] and whole["metrics"] == cut["metrics"]


@pytest.mark.parametrize("prediction", narrowed(["epsilon", "v_prediction", "flow"], "flow"))
def test_few_steps_are_a_uniform_mixture(prediction: str, tmp_path: Path) -> None:
    """Each update matches the answer of one of four steps, drawn alike (arXiv:2505.12674)."""
    made = Doubled(tmp_path / "one", prediction, method="sid", student_steps=4)
    with made.hooked(False):
        steps = [made.turns.simulate(made.batch(step=step)).step for step in range(200)]
    counts = [steps.count(step) for step in range(4)]
    assert min(counts) > 30 and made.turns.simulate.cost == 2.5
    run(tmp_path / "run", small(method="sid", student_steps=4, steps=2), host=SmallHost(prediction))


class Stored(nn.Module):
    """Two layers as a 4-bit checkpoint has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = (stored(nn.Linear(*sizes), "nf4") for sizes in ((8, 64), (64, 8)))

    def forward(self, x: torch.Tensor, time: torch.Tensor, cond: Cond) -> torch.Tensor:
        return self.out(torch.tanh(self.into(x.flatten(1)) + cond.text.mean((1, 2))[:, None])).reshape(x.shape)


def test_a_base_in_4_bits_will_do() -> None:
    """Its gradient in the input is all that is asked of it."""
    network, world = Stored(), World(CASES[4])
    roles = Roles([Target("into", network.into), Target("out", network.out)])
    roles.add("critic", 2, 0)
    for _, b in roles.state("critic").values():
        b.normal_(generator=torch.Generator().manual_seed(1))
    denoise, batch, x = FlowDenoiser(network, FlowSchedule(), roles), world.batch(), drawn().float()
    with roles.installed():
        made = replace(sid(settings_for("sid", matching_guidance=3.0)), levels=At(0.5))
        found, _ = made.cotangent(denoise, Batch(**vars(batch)), x)
        free, sigma = x.clone().requires_grad_(), torch.full((4,), 0.5, dtype=torch.float64)
        x_s = 0.5 * free + 0.5 * Batch(**vars(batch)).normal("match noise")
        d_c, d_u = (denoise(x_s, sigma, cond) for cond in (world.cond, world.null.repeat(4)))
        with roles.use("critic", train=False):
            fake = denoise(x_s, sigma, world.cond)
        real = d_u + 3 * (d_c - d_u)
        m = (free - real).detach().abs().mean((1, 2, 3), keepdim=True)
        ((real - fake) * (fake - free) / m).sum().backward()
    assert free.grad is not None
    torch.testing.assert_close(found, free.grad, rtol=1e-4, atol=1e-4 * float(free.grad.abs().max()))
