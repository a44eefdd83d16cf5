"""Guidance that is drawn, falls or is brought back, the weight's floor, levels that decay: against NumPy."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from oracles import CASES, Array, At, Case, World, drawn, levels_in_numpy, rows
from small_host import SmallHost

from onestep.core.errors import OneStepError
from onestep.training.engine.levels import UniformTime
from onestep.training.methods import METHODS, guidance_scale, settings_for
from onestep.training.methods import distribution_matching as engine
from onestep.training.methods.dmd import dmd
from onestep.training.methods.guidance_scale import RandomScale
from onestep.training.methods.vsd import vsd

THREE = [CASES[0], CASES[2], CASES[4]]
"""eps, v and flow."""
EVERY = [*THREE, CASES[5], CASES[6]]


def answers(world: World, level: tuple[Any, Any], stream: str = "match") -> tuple[Array, Array, Array, Array]:
    """(D_c, D_u, D_F, D_F,u) [4, WIDTH] of the noised x at ``level``."""
    x_s = level[0] * rows(drawn()) + level[1] * rows(world.batch().normal(f"{stream} noise"))
    null = world.null.repeat(4)
    asked = [(role, cond) for role in ("teacher", "critic") for cond in (world.cond, null)]
    d_c, d_u, d_f, d_fu = (world.x0(role, x_s, cond, *level) for role, cond in asked)
    return d_c, d_u, d_f, d_fu


def brought_back(d_c: Array, d_u: Array, k: Array | float, phi: float) -> Array:
    """arXiv:2305.08891, Eq. 15 and 16, written apart: deviations over a sample's elements."""
    plain = d_u + k * (d_c - d_u)
    same = plain * d_c.std(1, ddof=1, keepdims=True) / plain.std(1, ddof=1, keepdims=True)
    return phi * same + (1 - phi) * plain


# -- drawn at random --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_pg_sb_guides_both_sides_by_one_draw(case: Case) -> None:
    """alpha sigma (eps_R^k - eps_F^k) with a k of its own for each sample, in noise predictions."""
    world, x = World(case), drawn()
    own = settings_for("pg-sb", matching_guidance=1.5, guidance_end=6.0)
    g, _ = vsd(own).cotangent(world.denoise, world.batch(), x)
    k = 1.5 + 4.5 * world.batch().uniform("guidance scale").numpy()[:, None]
    assert len(np.unique(k)) == 4 and k.min() >= 1.5 and k.max() < 6
    alpha, sigma = levels_in_numpy(case, world.batch().uniform("match level").numpy())
    x_s = alpha * rows(x) + sigma * rows(world.batch().normal("match noise"))
    d_c, d_u, d_f, d_fu = answers(world, (alpha, sigma))
    eps_r, eps_f = ((x_s - alpha * (u + k * (c - u))) / sigma for c, u in ((d_c, d_u), (d_f, d_fu)))
    wanted = sigma**2 * (eps_r - eps_f) / (alpha**2 + sigma**2)
    np.testing.assert_allclose(rows(g), wanted, rtol=1e-7, atol=1e-9)


def test_pg_sb_at_a_fixed_scale_is_vsd() -> None:
    """Where its range is one number, and where it is constant."""
    common = {"matching_guidance": 4.5, "level_low": 0.1}
    one = vsd(settings_for("pg-sb", guidance_end=4.5, **common))
    constant = vsd(settings_for("pg-sb", guidance_schedule="constant", **common))
    assert one == constant == vsd(settings_for("vsd", **common))
    assert METHODS["pg-sb"].settings().guidance_schedule == "random"
    assert vsd(settings_for("vsd", guidance_schedule="random", guidance_end=6.0, **common)) == vsd(
        settings_for("pg-sb", guidance_end=6.0, **common)
    )


@pytest.mark.parametrize("case", EVERY, ids=str)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_pg_sb_has_vsds_fixed_point(case: Case, rescale: float) -> None:
    """Where critic and teacher agree nothing is left, whatever was drawn."""
    world, x = World(case), drawn()
    for _, b in world.roles.state("critic").values():
        b.zero_()
    g, _ = vsd(settings_for("pg-sb", guidance_rescale=rescale)).cotangent(world.denoise, world.batch(), x)
    assert float(g.abs().max()) <= 1e-12


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_dmd_with_a_drawn_scale(case: Case) -> None:
    """The teacher's side alone; the weight is that of the picture guided so."""
    world, x = World(case), drawn()
    own = settings_for(matching_guidance=6.0, guidance_schedule="random", guidance_end=2.0)
    g, _ = dmd(own).cotangent(world.denoise, world.batch(), x)
    k = 2.0 + 4.0 * world.batch().uniform("guidance scale").numpy()[:, None]
    level = levels_in_numpy(case, world.batch().uniform("match level").numpy())
    d_c, d_u, d_f, _ = answers(world, level)
    weight = 1 / np.abs(rows(x) - d_u - k * (d_c - d_u)).mean(1, keepdims=True)
    np.testing.assert_allclose(rows(g), weight * (d_f - d_c - (k - 1) * (d_c - d_u)), rtol=1e-7, atol=1e-9)


def test_a_draw_is_the_samples_own_whatever_the_micro_batch() -> None:
    world = World(CASES[0])
    whole, scale = world.batch(), RandomScale(1.0, 5.0)
    parts = [replace(whole, cond=whole.cond[row : row + 1], samples=[row]) for row in range(4)]
    assert torch.equal(scale(whole), torch.cat([scale(part) for part in parts]))
    assert not torch.equal(scale(whole), scale(world.batch(step=4)))


# -- falling over the run ---------------------------------------------------------------------------------------------


def test_what_changes_over_the_run_goes_in_a_line() -> None:
    own = settings_for(matching_guidance=7.0, guidance_schedule="falling", guidance_end=3.0, level_high_end=0.58)
    assert [dmd(own, along).guidance for along in (0.0, 0.25, 1.0)] == [7.0, 6.0, 3.0]
    highs = [dmd(own, along).levels.high for along in (0.0, 0.25, 1.0)]  # type: ignore[union-attr]
    assert highs == pytest.approx([0.98, 0.88, 0.58], abs=1e-12)
    both = vsd(own, 0.5)
    assert both.guidance == both.critic_guidance == 5.0 and both.null_rate == 0.1
    still = settings_for(matching_guidance=7.0)
    assert dmd(still, 0.7) == dmd(still) and dmd(still).levels == UniformTime(0.02, 0.98)
    apart = dmd(settings_for(separate_levels=True, level_high_end=0.5), 1.0)
    assert apart.guidance_levels == apart.levels == UniformTime(0.02, 0.5)


# -- brought back -----------------------------------------------------------------------------------------------------


def check_rescaled(module: ModuleType, case: Case) -> None:
    """`guided` and `added` in NumPy, and at k = 1 exactly nothing is added."""
    world, k = World(case), np.array([[1.0], [2.5], [4.0], [7.0]])
    d_c, d_u, _, _ = answers(world, (case.alpha, case.sigma))
    c, u, scale = (torch.from_numpy(np.ascontiguousarray(value)) for value in (d_c, d_u, k[:, 0]))
    for phi in (0.0, 0.7, 1.0):
        wanted = brought_back(d_c, d_u, k, phi)
        np.testing.assert_allclose(module.guided(c, u, scale, phi).numpy(), wanted, rtol=1e-10, atol=1e-12)
        added = module.added(c, u, scale, phi).numpy()
        np.testing.assert_allclose(added, wanted - d_c, rtol=1e-9, atol=1e-11)
        assert np.abs(added[0]).max() < 1e-12
    assert float(module.added(c, u, scale, 0.0)[0].abs().max()) == 0


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_a_rescaled_answer(case: Case) -> None:
    check_rescaled(guidance_scale, case)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_a_rescaled_guidance_term(case: Case) -> None:
    """G = w (D_F - D_c - (D^k' - D_c)), the weight too of the answer that is brought back."""
    world, x, k, phi = World(case), drawn(), 5.0, 0.7
    objective = engine.DistributionMatching(guidance=k, levels=At(case.sigma), rescale=phi)
    g, scores = objective.cotangent(world.denoise, world.batch(), x)
    d_c, d_u, d_f, _ = answers(world, (case.alpha, case.sigma))
    real = brought_back(d_c, d_u, k, phi)
    assert scores.guided is not None
    np.testing.assert_allclose(rows(scores.guided), real, rtol=1e-8, atol=1e-10)
    weight = 1 / np.abs(rows(x) - real).mean(1, keepdims=True)
    np.testing.assert_allclose(rows(g), weight * (d_f - real), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_guidance_with_each_tokens_norm(case: Case) -> None:
    """As diffusers guides Qwen-Image, in NumPy: a token is a latent's channels, whose v_k has the length of v_c."""
    world, x, k = World(case), drawn(), 5.0
    world.denoise.token_norm = 1
    objective = engine.DistributionMatching(guidance=k, levels=At(case.sigma))
    g, scores = objective.cotangent(world.denoise, world.batch(), x)
    x_s = case.alpha * rows(x) + case.sigma * rows(world.batch().normal("match noise"))
    d_c, d_u, d_f, _ = (value.reshape(-1, 2, 4) for value in answers(world, (case.alpha, case.sigma)))
    x_s = x_s.reshape(-1, 2, 4)
    v_c, v_k = x_s - d_c, x_s - (d_u + k * (d_c - d_u))
    length = np.linalg.norm(v_c, axis=1, keepdims=True) / np.linalg.norm(v_k, axis=1, keepdims=True)
    real = (x_s - length * v_k).reshape(len(x), -1)
    np.testing.assert_allclose(rows(scores.guided), real, rtol=1e-8, atol=1e-10)
    weight = 1 / np.abs(rows(x) - real).mean(1, keepdims=True)
    np.testing.assert_allclose(rows(g), weight * (d_f.reshape(len(x), -1) - real), rtol=1e-8, atol=1e-10)


def test_a_fully_rescaled_answer_has_the_deviation_of_the_plain_one() -> None:
    c, u = drawn(seed=1), drawn(seed=2)
    back = guidance_scale.guided(c, u, torch.full((4,), 8.0, dtype=torch.float64), 1.0)
    torch.testing.assert_close(back.flatten(1).std(1), c.flatten(1).std(1))


MUTANTS = {
    "the null's deviation": ("d_c.flatten(1).std(1)", "d_u.flatten(1).std(1)"),
    "upside down": ("rescale * ratio + (1 - rescale)", "rescale / ratio + (1 - rescale)"),
    "the other share": ("rescale * ratio + (1 - rescale)", "(1 - rescale) * ratio + rescale"),
    "k for k - 1": ("expand(k - 1, d_c)", "expand(k, d_c)"),
    "towards the null": ("else expand(k - 1, d_c) * (d_c - d_u)", "else expand(k - 1, d_c) * (d_u - d_c)"),
    "from the prompt": ("answer = d_u + expand", "answer = d_c + expand"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_rescaling_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.guidance_scale", *change, monkeypatch)
    must_fail(lambda mutated: check_rescaled(mutated, CASES[4]), module)


# -- the weight's floor -----------------------------------------------------------------------------------------------


def test_the_floor_of_the_normaliser() -> None:
    """A sample nearer to the teacher than the floor weighs as one that far."""
    far = torch.tensor([1e-3, 0.04, 0.2, 3.0], dtype=torch.float64)
    x = drawn()
    scores = engine.Scores(x, x, torch.ones(4), real=x + far[:, None, None, None], fake=x)
    schedule = World(CASES[0]).schedule
    weights = engine.DmdWeight(0.05)(schedule, scores)
    np.testing.assert_allclose(weights.numpy(), [20.0, 20.0, 5.0, 1 / 3], rtol=1e-9)
    assert dmd(settings_for(normaliser_floor=0.05)).weight == engine.DmdWeight(0.05)
    assert dmd(settings_for()).weight == engine.dmd_weight


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dmd", "vsd", "pg-sb"])
@pytest.mark.parametrize("kind", ["random", "falling"])
def test_a_base_without_a_null_refuses_the_other_end_too(method: str, kind: str) -> None:
    host = SmallHost()
    host.denoiser.guidance = "none"
    told = settings_for(method, matching_guidance=1.0, guidance_schedule=kind, guidance_end=3.0)
    with pytest.raises(OneStepError, match="guidance_end 3 cannot be had: set it to 1"):
        METHODS[method].check(host, told)
    METHODS[method].check(host, settings_for(method, matching_guidance=1.0, guidance_schedule="constant"))


def test_levels_that_would_cross_are_refused() -> None:
    with pytest.raises(OneStepError, match="level_low 0.5 must be below level_high_end 0.4"):
        settings_for(level_low=0.5, level_high_end=0.4)
