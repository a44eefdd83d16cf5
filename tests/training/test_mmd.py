"""The maximum mean discrepancy: by hand, by its moments of Gaussians, by finite differences; and what is kept."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from narrowed import narrowed
from oracles import CASES, TAU, WIDTH, Array, Case, World, drawn, rows
from small_host import SmallHost, setup_of, small
from torch import Tensor

from onestep.core.errors import OneStepError
from onestep.training.engine.student import STUDENT
from onestep.training.methods import METHODS
from onestep.training.methods import mmd as method

WORLDS = [case for case in CASES if case.name in ("eps", "v", "flow")]
BINOMIAL = (1, 3, 3, 1)


def itself(denoise: Any, batch: Any, x: Tensor, stream: str) -> Tensor:
    """The picture is its own features."""
    return x.flatten(1)


def banks(module: ModuleType, student: Tensor, teacher: Tensor, groups: list[int], filled: int | None = None) -> Any:
    """Of as many rows as are given, the last ``filled`` of them there."""
    made = module.Banks(len(student), groups, 4).to(student)
    with torch.no_grad():
        made.student.copy_(student)
        made.teacher.copy_(teacher)
        made.filled.fill_(len(student) if filled is None else filled)
    return made


def by_hand(a: Array, student: Array, teacher: Array, groups: list[int]) -> Array:
    """L [B], each pair by itself."""
    mean, spread = teacher.mean(0), teacher.std(0)
    unit = spread + 0.1 * spread.mean()
    ends = np.cumsum([0, *groups])

    def k(one: Array, other: Array) -> float:
        u, w = (one - mean) / unit, (other - mean) / unit
        inner = sum(float(u[low:high] @ w[low:high]) / (high - low) for low, high in zip(ends, ends[1:]))  # noqa: B905
        return (inner + 1) ** 3

    return np.array(
        [2 * np.mean([k(row, s) for s in student]) - 2 * np.mean([k(row, t) for t in teacher]) for row in a]
    )


def some(count: int, seed: int, width: int = WIDTH) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5 + 0.3


def check_loss(module: ModuleType) -> None:
    a, student, teacher = some(4, 1), some(40, 2), some(40, 3)
    for filled in (40, 25):
        there = (part[-filled:].numpy() for part in (student, teacher))
        found = banks(module, student, teacher, [5, 3], filled).loss(a)
        np.testing.assert_allclose(found.numpy(), by_hand(a.numpy(), *there, [5, 3]), rtol=1e-9)
    assert not banks(module, student, teacher, [5, 3], 15).loss(a).any()
    assert float(banks(module, teacher, teacher, [5, 3]).loss(a).abs().max()) < 1e-9


def test_the_loss_by_hand() -> None:
    check_loss(method)


def check_moments(module: ModuleType) -> None:
    """The mean of dL/da over the student's features is the derivative of sum_n C(3, n) (E a^n - E b^n)^2 in their
    mean."""
    z = torch.special.ndtri((torch.arange(4001, dtype=torch.float64) + 0.5) / 4001)[:, None]
    mean, spread = 0.4, 0.7
    a = (mean + spread * z).requires_grad_()
    banks(module, a.detach(), z, [1]).loss(a).mean().backward()
    assert a.grad is not None
    # in units of what the teacher's vary by
    unit = float(z.std(correction=0)) * 1.1

    def discrepancy(at: float) -> float:
        ours, theirs = ((at + spread * z) / unit).numpy(), (z / unit).numpy()
        return float(sum(c * ((ours**n).mean() - (theirs**n).mean()) ** 2 for n, c in enumerate(BINOMIAL)))

    step = 1e-5
    wanted = (discrepancy(mean + step) - discrepancy(mean - step)) / (2 * step)
    assert float(a.grad.sum()) == pytest.approx(wanted, rel=1e-6)


def test_its_gradient_is_that_of_the_moments_of_gaussians() -> None:
    check_moments(method)


def check_pull(module: ModuleType, case: Case) -> None:
    """The student's factors, by finite differences of L of its answers in the Gaussian world."""
    world, x = World(case), drawn(seed=1)
    factors, kept = world.double_factors(STUDENT), banks(module, some(40, 2), some(40, 3), [WIDTH])
    with world.roles.use(STUDENT):
        x0 = world.denoise(x, world.sigma(), world.cond)
    cotangent, features, loss = module.pull(world.denoise, world.batch(), itself, kept, x0)
    x0.backward(cotangent / 4)
    np.testing.assert_allclose(rows(features), rows(x0))

    def value() -> float:
        a = world.x0(STUDENT, rows(x), world.cond)
        return WIDTH * float(by_hand(a, some(40, 2).numpy(), some(40, 3).numpy(), [WIDTH]).mean())

    assert WIDTH * float(loss.mean()) == pytest.approx(value(), rel=1e-6)
    for factor in factors:
        place, ends = tuple(0 for _ in factor.shape), []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                factor[place] += step
                ends.append(value())
            factor[place] += 1e-6
        assert factor.grad is not None
        assert float(factor.grad[place]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("case", WORLDS, ids=str)
def test_the_students_gradient_by_finite_differences(case: Case) -> None:
    check_pull(method, case)


def test_it_leads_to_the_teachers_moments() -> None:
    """A mean that follows the gradient, features the pictures themselves, ends at the teacher's."""
    draw, world = torch.Generator().manual_seed(4), World(CASES[4])
    target = torch.from_numpy(world.mean("teacher", world.cond))[0]
    teacher = target + TAU * torch.randn(400, WIDTH, generator=draw, dtype=torch.float64)
    noise, mean = torch.randn(400, WIDTH, generator=draw, dtype=torch.float64), torch.zeros(WIDTH, dtype=torch.float64)
    noise = (noise - noise.mean(0)) * TAU
    mean.requires_grad_()
    for _ in range(300):
        a = mean + noise
        loss = banks(method, a.detach(), teacher, [WIDTH]).loss(a).mean()
        (slope,) = torch.autograd.grad(loss, mean)
        with torch.no_grad():
            mean -= 0.1 * slope / (1 + slope.norm())
    torch.testing.assert_close(mean.detach(), teacher.mean(0), rtol=0, atol=0.05)


# -- what is kept -----------------------------------------------------------------------------------------------------


def check_settled(module: ModuleType) -> None:
    """The newest last, in the batch's order however it is cut; what is done again counts once."""
    world, kept = World(CASES[4]), module.Banks(6, [2], 4)
    batch = world.batch()
    for update in range(3):
        a, b = (torch.arange(8.0).reshape(4, 2) + 10 * update + 100 * side for side in (0, 1))
        now = type(batch)(batch.cond, batch.null, 5, update, range(4), batch.shape, batch.device)
        halves = [
            type(batch)(batch.cond[part], batch.null, 5, update, range(4)[part], batch.shape, batch.device)
            for part in (slice(2, 4), slice(0, 2))
        ]
        kept.note(now, a + 1, b)
        for half, part in zip(halves, (slice(2, 4), slice(0, 2)), strict=True):
            kept.note(half, a[part], b[part])
        kept.settle()
        assert float(kept.filled) == min(6, 4 * (update + 1))
        torch.testing.assert_close(kept.student[-4:].detach(), a)
        torch.testing.assert_close(kept.teacher[-4:].detach(), b)
    torch.testing.assert_close(kept.student[0].detach(), torch.tensor([14.0, 15.0]))


def test_the_newest_take_the_place_of_the_oldest() -> None:
    check_settled(method)


# -- the base's features ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", narrowed(["epsilon", "v_prediction", "flow"], "flow"))
def test_features_are_means_of_the_bases_channels(prediction: str, tmp_path: Path) -> None:
    """Of a picture with noise at the level, whoever serves otherwise; and the prompt's."""
    host = SmallHost(prediction)
    setup = setup_of(host, small(method="mmd", head_blocks=2, feature_level=0.2), tmp_path)
    host.denoiser.roles.add(STUDENT, 2, 0)
    for _, b in host.denoiser.roles.state(STUDENT).values():
        b.add_(1.0)
    phi = method.BaseFeatures(method.features_of(host, setup.settings), 0.2)
    batch = setup.prompts.batch(0, range(4))
    x, seen = batch.normal("some"), []
    hooks = [block.register_forward_hook(lambda m, a, out: seen.append(out.mean((2, 3)))) for block in host.blocks]
    with host.denoiser.roles.installed(), torch.no_grad():
        with host.denoiser.roles.use(STUDENT):
            found = phi(host.denoiser, batch, x, "this")
        seen.clear()
        share = (
            0.2 if prediction == "flow" else float(host.denoiser.schedule.sigma_of_time(torch.tensor(200.0).double()))
        )
        alpha = 1 - share if prediction == "flow" else (1 - share**2) ** 0.5
        sigma = torch.full((4,), share, dtype=torch.float64)
        host.denoiser(alpha * x + share * batch.normal("this features"), sigma, batch.cond)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, torch.cat([*seen, batch.cond.summary], 1), rtol=1e-5, atol=1e-6)
    assert phi.groups(setup) == [sum(part.shape[1] for part in seen), batch.cond.summary.shape[1]]


def test_a_run_of_no_updates_is_refused() -> None:
    with pytest.raises(OneStepError, match="steps and warm_start are both 0"):
        small(method="mmd", steps=0, warm_start=0)
    assert METHODS["mmd"].makes == "LoRA"


MUTANTS: dict[str, tuple[str, str]] = {
    "away from the teacher's": ("kernel(a, ours) - kernel(a, theirs)", "kernel(a, theirs) - kernel(a, ours)"),
    "the student's own alone": ("kernel(a, ours) - kernel(a, theirs)", "kernel(a, ours)"),
    "half": ("witness = 2 *", "witness = 1 *"),
    "another power": ("(a @ b.T + 1) ** 3", "(a @ b.T + 1) ** 2"),
    "no one": ("(a @ b.T + 1) ** 3", "(a @ b.T) ** 3"),
    "a sum of channels": ("clamp_min(1e-6) * self.sizes.sqrt()", "clamp_min(1e-6)"),
    "all rows": ("@ there / count", "@ torch.ones_like(there) / count"),
    "not in units": ("((value - mean) / unit for value", "((value - mean) for value"),
    "not by elements": ("x[0].numel() * loss.sum()", "loss.sum()"),
    "the oldest last": (
        "torch.cat([bank[len(rows) :], rows.to(bank)])",
        "torch.cat([rows.to(bank), bank[: -len(rows)]])",
    ),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_equation_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: ModuleType) -> None:
        check_loss(module)
        check_pull(module, CASES[4])
        check_settled(module)

    must_fail(wrong, mutant("onestep.training.methods.mmd", *change, monkeypatch))
