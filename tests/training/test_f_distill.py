"""f-distill: the weights of seven divergences, the means they are brought to, and what reduces to dmd2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from best_head import THREE, BestHead, best, looking_at
from mutations import must_fail, mutant
from narrowed import narrowed
from oracles import CASES, Array, At, Case, World, drawn, rows
from small_host import SmallHost, small
from whole_runs import cancelled_and_whole, factors, newest, run

from onestep.core.tensor_file import read_tensors
from onestep.training.methods import f_divergence
from onestep.training.methods.discriminator import Discriminator
from onestep.training.methods.distribution_matching import DistributionMatching
from onestep.training.methods.f_divergence import BINS, WEIGHTS, Ratios

F: dict[str, Callable[[Array], Array]] = {
    "reverse-kl": lambda r: -np.log(r),
    "kl": lambda r: r * np.log(r),
    "jensen-shannon": lambda r: r * np.log(r) - (r + 1) * np.log((r + 1) / 2),
    "softened-reverse-kl": lambda r: (r + 1) * np.log(0.5 + 0.5 / r),
    "neyman": lambda r: (1 - r) ** 2 / (2 * r),
    "squared-hellinger": lambda r: 2 * (1 - np.sqrt(r)) ** 2,
    "jeffreys": lambda r: (r - 1) * np.log(r),
}
"""D_f(p || q) = E_q[f(p / q)], with the factors that h leaves out."""


# -- the weights ------------------------------------------------------------------------------------------------------


def check_weight(module: ModuleType, name: str) -> None:
    """d D_f / dm for p = N(0.3, 1), q = N(m, 0.8^2), by quadrature: E_q[h(r) (score of q - score of p)], x = m + 0.8 n,
    against the divergence's finite difference."""
    x = np.linspace(-9, 9, 40001)

    def density(mean: float, deviation: float) -> Array:
        return np.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))  # type: ignore[no-any-return]

    def divergence(mean: float) -> float:
        q = density(mean, 0.8)
        return float(np.trapezoid(q * F[name](density(0.3, 1.0) / q), x))

    mean, step = 0.9, 1e-4
    q = density(mean, 0.8)
    h = module.WEIGHTS[name](torch.from_numpy(density(0.3, 1.0) / q)).numpy()
    slope = np.trapezoid(q * h * (-(x - mean) / 0.64 + (x - 0.3)), x)
    wanted = (divergence(mean + step) - divergence(mean - step)) / (2 * step)
    assert slope == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_weight_is_its_divergences_gradient(name: str) -> None:
    check_weight(f_divergence, name)


def test_all_seven_are_there() -> None:
    assert WEIGHTS.keys() == F.keys() and len(F) == 7


# -- the cotangent ----------------------------------------------------------------------------------------------------


def weighing(world: World, ratios: Ratios, k: float = 2.0) -> DistributionMatching:
    """The objective of a run, with the head at its best against what the critic draws."""
    judge = Discriminator(BestHead(world, fake="critic"), looking_at(world))
    return DistributionMatching(
        guidance=k,
        levels=At(world.case.sigma),
        judge=judge,
        ratio=lambda scores: ratios(world.schedule, scores.sigma, scores.logit),  # type: ignore[arg-type]
    )


def told(ratios: Ratios) -> Ratios:
    """With means such as a run has."""
    with torch.no_grad():
        ratios.ratio.copy_(torch.linspace(0.5, 3.0, BINS))
        ratios.weight.fill_(0.8)
    return ratios


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("case", THREE, ids=str)
def test_the_matching_is_weighed_by_the_densities_ratio(case: Case, name: str) -> None:
    """G = h(r / mean) / mean h, times dmd's, r = N(x_s; a m_T, V) / N(x_s; a m_F, V)."""
    world, x, ratios = World(case), drawn(), told(Ratios(name, 0.1, 20.0, 0.9))
    found, scores = weighing(world, ratios).cotangent(world.denoise, world.batch(), x)
    plain, _ = replace(weighing(world, ratios), judge=None, ratio=None).cotangent(world.denoise, world.batch(), x)
    x_s = case.alpha * rows(x) + case.sigma * rows(world.batch().normal("match noise"))
    r = np.exp(best(world, x_s, fake="critic"))
    assert scores.logit is not None
    np.testing.assert_allclose(scores.logit.detach().numpy(), np.log(r), rtol=1e-6, atol=1e-8)
    time = float(world.schedule.share_of(torch.tensor([case.sigma], dtype=torch.float64)))
    mean = np.linspace(0.5, 3.0, BINS)[min(BINS - 1, int(BINS * time))]
    r = np.clip(r, 0.1, 20) / mean
    h = {
        "reverse-kl": np.ones(4),
        "kl": r,
        "jensen-shannon": 1 - 1 / (1 + r),
        "softened-reverse-kl": 1 / (1 + r),
        "neyman": 1 / r,
        "squared-hellinger": r**0.5,
        "jeffreys": 1 + r,
    }[name]
    np.testing.assert_allclose(rows(found), h[:, None] / 0.8 * rows(plain), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", WEIGHTS)
def test_where_critic_and_teacher_agree_nothing_is_left(name: str) -> None:
    world, x = World(CASES[4]), drawn()
    for _, b in world.roles.state("critic").values():
        b.zero_()
    found, _ = weighing(world, Ratios(name, 0.1, 20.0, 0.9), 1.0).cotangent(world.denoise, world.batch(), x)
    assert float(found.abs().max()) <= 1e-12


@pytest.mark.parametrize("sliced", [False, True])
def test_the_logit_is_of_the_teachers_rows_with_the_prompt(sliced: bool) -> None:
    """Whether all rows are asked at once or one role after the other; the forwards are as many as without."""
    world, x, calls = World(CASES[2]), drawn(), []
    handle = world.network.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    ratios = Ratios("kl", 1e-4, 1e4, 0.9)
    batch = replace(world.batch(), sliced=sliced)
    _, scores = weighing(world, ratios).cotangent(world.denoise, batch, x)
    assert calls == ([4, 4, 4] if sliced else [12])
    handle.remove()
    x_s = CASES[2].alpha * rows(x) + CASES[2].sigma * rows(batch.normal("match noise"))
    assert scores.logit is not None
    np.testing.assert_allclose(scores.logit.detach().numpy(), best(world, x_s, fake="critic"), rtol=1e-6)


# -- the means --------------------------------------------------------------------------------------------------------


def check_means(module: ModuleType) -> None:
    """Two updates of seven samples each, in NumPy; in micro-batches, and with one done again, the same."""
    world, draw = World(CASES[4]), np.random.default_rng(3)
    ratios = module.Ratios("jensen-shannon", 0.1, 20.0, 0.75)
    mean, weight = np.ones(BINS), 0.5
    assert ratios.weight.tolist() == [0.5] and ratios.ratio.tolist() == [1.0] * BINS
    whole = world.batch(cond=world.cond[[0, 1, 2, 3, 0, 1, 2]])
    for step in (5, 6):
        sigma, logit = draw.uniform(0.0, 0.6, 7), draw.normal(0, 2, 7)
        cuts = [slice(0, 7)] if step == 5 else [slice(0, 4), slice(0, 2), slice(2, 4), slice(4, 7)]
        for cut in cuts:
            batch = replace(whole, step=step, samples=range(7)[cut])
            ratios.note(world.schedule, batch, *(torch.from_numpy(side[cut]) for side in (sigma, logit)))
        ratios.settle()
        r, bins = np.clip(np.exp(logit), 0.1, 20), (BINS * sigma).astype(int)
        for at in set(bins.tolist()):
            mean[at] = 0.75 * mean[at] + 0.25 * r[bins == at].mean()
        scaled = r / mean[bins]
        weight = 0.75 * weight + 0.25 * (scaled / (1 + scaled)).mean()
        np.testing.assert_allclose(ratios.ratio.numpy(), mean, rtol=1e-5)
        assert float(ratios.weight) == pytest.approx(weight, rel=1e-5)
    assert mean[BINS - 1] == 1.0  # nobody has looked there


def test_the_means_run_over_the_updates() -> None:
    check_means(f_divergence)


def test_an_update_that_was_broken_off_leaves_no_trace() -> None:
    world, ratios = World(CASES[4]), Ratios("kl", 0.1, 20.0, 0.0)
    sigma = torch.full((4,), 0.55, dtype=torch.float64)
    ratios.note(world.schedule, world.batch(step=1), sigma, torch.full((4,), 3.0))
    ratios.note(world.schedule, world.batch(step=2), sigma, torch.full((4,), 1.0))
    ratios.settle()
    assert ratios.ratio.tolist()[5] == pytest.approx(np.exp(1.0), rel=1e-6)


# -- whole runs -------------------------------------------------------------------------------------------------------

LEARNING = {"gan_start": 0.0, "gan_ramp": 0.5, "gan_weight": 1.0, "head_learning_rate": 1e-2, "steps": 4}


@pytest.mark.parametrize("prediction", narrowed(["epsilon", "v_prediction", "flow"], "flow"))
def test_by_the_reverse_kl_it_is_dmd2(prediction: str, tmp_path: Path) -> None:
    """To the bit: every factor of a run; by another divergence it is not."""
    one = run(tmp_path / "dmd2", small(method="dmd2", **LEARNING), host=SmallHost(prediction))
    settings = small(method="f-distill", divergence="reverse-kl", **LEARNING)
    other = run(tmp_path / "f", settings, host=SmallHost(prediction))
    assert factors(one.path) == factors(other.path)
    differs = run(tmp_path / "js", settings.with_(divergence="jensen-shannon"), host=SmallHost(prediction))
    assert factors(differs.path) != factors(one.path)


@pytest.mark.parametrize("poll", narrowed([20, 31], 31))
def test_a_run_that_is_stopped_ends_as_if_not(poll: int, tmp_path: Path) -> None:
    """With the means, which are of the state."""
    settings = small(method="f-distill", divergence="kl", head_updates=2, **LEARNING)
    cut, whole = cancelled_and_whole(tmp_path, settings, poll)
    assert whole["files"] == cut["files"] and whole["metrics"] == cut["metrics"]
    state = read_tensors(newest(tmp_path / "cut" / "run") / "state.safetensors")
    assert bool((state["head/ratios.ratio"] != 1).any()) and state["head/ratios.weight"].shape == (1,)
    assert not any(name.startswith("head.") and name.count(".") > 2 for name in state)


def test_micro_batches_make_no_difference(tmp_path: Path) -> None:
    settings = small(method="f-distill", divergence="kl", **LEARNING, learning_rate=1e-4)
    states = []
    for accumulation in (1, 4):
        run(tmp_path / str(accumulation), settings.with_(accumulation=accumulation))
        states.append(read_tensors(newest(tmp_path / str(accumulation)) / "state.safetensors"))
    for name in ("head/ratios.ratio", "head/ratios.weight"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-3, atol=1e-4)


MUTANTS = {
    "r and 1 / r exchanged": ("torch.exp(logit.detach()", "torch.exp(-logit.detach()"),
    "unbounded": (".clamp(self.low, self.high)", ""),
    "not brought to mean 1": ("self.clamped(logit) / self.ratio[", "self.clamped(logit) + 0 * self.ratio["),
    "h not brought to mean 1": ("logit)) / self.weight", "logit))"),
    "the mean of all levels": ("(sums / counts.clamp_min(1) - mean)", "(sums.sum() / counts.sum() - mean)"),
    "memory and what is new exchanged": ("(1 - self.memory) * (sums", "self.memory * (sums"),
    "h of ratios that are not scaled": ("self.h(ratios / mean[places])", "self.h(ratios)"),
    "one bin": ("(BINS * schedule.share_of(sigma))", "(0 * schedule.share_of(sigma))"),
    "levels nobody looked at": ("counts > 0", "counts >= 0"),
}


def check_weighed(module: Any) -> None:
    """G of one divergence, with the means of a run."""
    world, x = World(CASES[4]), drawn()
    ratios = told(module.Ratios("kl", 0.1, 20.0, 0.9))
    found, scores = weighing(world, ratios).cotangent(world.denoise, world.batch(), x)
    plain, _ = replace(weighing(world, ratios), judge=None, ratio=None).cotangent(world.denoise, world.batch(), x)
    x_s = CASES[4].alpha * rows(x) + CASES[4].sigma * rows(world.batch().normal("match noise"))
    at = int(BINS * float(world.schedule.share_of(scores.sigma)[0]))
    r = np.clip(np.exp(best(world, x_s, fake="critic")), 0.1, 20) / np.linspace(0.5, 3.0, BINS)[at]
    np.testing.assert_allclose(rows(found), r[:, None] / 0.8 * rows(plain), rtol=1e-5, atol=1e-8)


def test_the_kl_with_the_means_of_a_run() -> None:
    check_weighed(f_divergence)


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_wrong_means_are_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.f_divergence", *change, monkeypatch)

    def check(mutated: Any) -> None:
        check_means(mutated)
        check_weighed(mutated)

    must_fail(check, module)


WRONG = {
    "jensen-shannon": ("r / (1 + r)", "r / (2 + r)"),
    "softened-reverse-kl": ("lambda r: 1 / (1 + r)", "lambda r: 1 + r"),
    "neyman": ("lambda r: 1 / r", "lambda r: r"),
    "squared-hellinger": ("torch.sqrt", "torch.square"),
    "kl": ("lambda r: r,", "lambda r: 1 / r,"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_weight_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.f_divergence", *WRONG[name], monkeypatch)
    must_fail(lambda mutated: check_weight(mutated, name), module)
