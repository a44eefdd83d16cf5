"""VSD as its settings make it: teacher and critic under one guidance, weighted by alpha sigma (arXiv:2312.05239)."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from mutations import must_fail, mutant
from oracles import CASES, Case, World, drawn, levels_in_numpy, rows

from onestep.training.engine.levels import UniformTime
from onestep.training.methods import settings_for
from onestep.training.methods import vsd as method

K = 4.5


def check_cotangent(module: ModuleType, case: Case) -> None:
    """In noise predictions, Eq. 9 of arXiv:2305.16213: sigma^2 (eps_R^k - eps_F^k), eps = (x_s - alpha D) / sigma.

    Written out from eps, so that the weight alpha sigma of the x0 form is derived here, not copied.
    """
    world, x = World(case), drawn()
    g, _ = module.vsd(settings_for(matching_guidance=K)).cotangent(world.denoise, world.batch(), x)
    alpha, sigma = levels_in_numpy(case, world.batch().uniform("match level").numpy())
    x_s = alpha * rows(x) + sigma * rows(world.batch().normal("match noise"))
    guided = {}
    for role in ("teacher", "critic"):
        d_c, d_u = (world.x0(role, x_s, cond, alpha, sigma) for cond in (world.cond, world.null.repeat(4)))
        guided[role] = (x_s - alpha * (d_u + K * (d_c - d_u))) / sigma
    wanted = sigma**2 * (guided["teacher"] - guided["critic"])
    # on a schedule with alpha^2 + sigma^2 != 1 the weight is that of the same picture on a variance-preserving one
    wanted = wanted / (alpha**2 + sigma**2)
    np.testing.assert_allclose(rows(g), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_of_the_paper(case: Case) -> None:
    check_cotangent(method, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_critic_that_is_the_teacher_leaves_nothing(case: Case) -> None:
    """Guidance is on both sides, so it cancels."""
    world, x = World(case), drawn()
    for _, b in world.roles.state("critic").values():
        b.zero_()
    g, _ = method.vsd(settings_for(matching_guidance=K)).cotangent(world.denoise, world.batch(), x)
    assert float(g.abs().max()) <= 1e-12


def test_the_settings_reach_the_objective() -> None:
    made = method.vsd(settings_for(matching_guidance=K, matching_weight=0.5, level_low=0.1, level_high=0.7))
    assert (made.guidance, made.critic_guidance, made.matching, made.null_rate) == (K, K, 0.5, 0.1)
    assert made.levels == UniformTime(0.1, 0.7) and made.guidance_levels is None
    alone = method.vsd(settings_for(matching_guidance=1.0))
    assert (alone.critic_guidance, alone.null_rate) == (1.0, 0.0)


MUTANTS = {
    "the critic unguided": ("critic_guidance=k", "critic_guidance=1.0"),
    "DMD's weight": ("weight=_weight", "weight=dmd_weight"),
    "another weight": ("at(vsd_weight, schedule, scores.sigma)", "2 * at(vsd_weight, schedule, scores.sigma)"),
    "other levels": ("        levels=levels", "        levels=UniformTime(0.0, 1.0)"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_loss_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.vsd", *change, monkeypatch)
    vars(module)["UniformTime"] = UniformTime
    vars(module).setdefault("dmd_weight", lambda schedule, scores: 1 / (scores.x - scores.real).abs().mean((1, 2, 3)))
    must_fail(lambda mutated: check_cotangent(mutated, CASES[4]), module)
