"""The discriminator head's losses, their gradients and its best, in the Gaussian world where that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from best_head import THREE, BestHead, best, looking_at
from mutations import must_fail, mutant
from oracles import CASES, SHAPE, TAU, WIDTH, Array, At, Case, World, drawn, rows
from torch import Tensor

from onestep.core.cond import Cond
from onestep.training.methods import discriminator
from onestep.training.methods.discriminator import LOSSES, Discriminator, Head
from onestep.training.methods.distribution_matching import DistributionMatching


def made(module: ModuleType, world: World, head: Any = None, loss: str = "softplus", **more: Any) -> Discriminator:
    head = BestHead(world) if head is None else head
    found = module.Discriminator(head, looking_at(world), module.LOSSES[loss], At(world.case.sigma), **more)
    return found  # type: ignore[no-any-return]


def sigmoid(h: Array) -> Array:
    return 1 / (1 + np.exp(-h))


# -- the student's term -----------------------------------------------------------------------------------------------


def check_cotangent(module: ModuleType, case: Case, loss: str) -> None:
    """d dl/dx by the chain rule: dl/dH = -sigmoid(-H), or -1; dH/dx_s = a (m_r - m_f) / V; dx_s/dx = a."""
    world, x = World(case), drawn()
    found, numbers = made(module, world, loss=loss).cotangent(world.denoise, world.batch(), x)
    a, s = case.alpha, case.sigma
    h = best(world, a * rows(x) + s * rows(world.batch().normal("gan noise")))
    slope = -sigmoid(-h) if loss == "softplus" else -np.ones_like(h)
    towards = world.mean("teacher", world.cond) - world.mean("student", world.cond)
    wanted = WIDTH * slope[:, None] * a**2 * towards / (a**2 * TAU**2 + s**2)
    np.testing.assert_allclose(rows(found), wanted, rtol=1e-7, atol=1e-10)
    value = np.log1p(np.exp(-h)) if loss == "softplus" else -h
    assert float(numbers["gan"]) == pytest.approx(value.mean(), rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", THREE, ids=str)
def test_what_the_student_is_told(case: Case, loss: str) -> None:
    check_cotangent(discriminator, case, loss)


@pytest.mark.parametrize("case", THREE, ids=str)
def test_it_is_the_losses_gradient(case: Case) -> None:
    """Finite differences through a real head of two layers, at its own levels."""
    world, x = World(case), drawn()
    judge = Discriminator(filled(cells=True), looking_at(world))
    found, _ = judge.cotangent(world.denoise, world.batch(), x)
    assert not any(value.grad is not None for value in judge.head.parameters())  # type: ignore[attr-defined]

    def loss(moved: Tensor) -> float:
        return WIDTH * len(x) * float(judge.cotangent(world.denoise, world.batch(), moved)[1]["gan"])

    step = 1e-6
    for place in [(0, 0, 0, 0), (1, 1, 0, 1), (3, 0, 1, 1)]:
        moved = torch.zeros_like(x)
        moved[place] = step
        slope = (loss(x + moved) - loss(x - moved)) / (2 * step)
        assert float(found[place]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("case", THREE, ids=str)
def test_where_all_agree_nothing_is_left(case: Case) -> None:
    """The student draws what the teacher draws, the critic knows it, and the head is at its best: no gradient at
    k = 1."""
    world, x = World(case), drawn()
    for role in ("student", "critic"):
        for _, b in world.roles.state(role).values():
            b.zero_()
    found, _ = made(discriminator, world).cotangent(world.denoise, world.batch(), x)
    matched, _ = DistributionMatching(guidance=1.0).cotangent(world.denoise, world.batch(), x)
    assert float(found.abs().max()) <= 1e-12 and float(matched.abs().max()) <= 1e-12


# -- the head's loss --------------------------------------------------------------------------------------------------


def check_head_loss(module: ModuleType, case: Case, loss: str, penalty: float) -> None:
    """Of the real pictures, the fake ones and those with a little noise, in NumPy."""
    world, real, fake = World(case), drawn(seed=5), drawn(seed=6)
    judge, batch = made(module, world, loss=loss, penalty=penalty, spread=0.3), world.batch()
    found, numbers = judge.head_loss(world.denoise, batch, real, fake)
    a, s = case.alpha, case.sigma
    noise = s * rows(batch.normal("head real noise"))
    h_real = best(world, a * rows(real) + noise)
    h_fake = best(world, a * rows(fake) + s * rows(batch.normal("head fake noise")))
    moved = rows(real) + 0.3 * rows(batch.normal("head penalty noise"))
    h_moved = best(world, a * moved + noise)
    if loss == "softplus":
        wanted = np.log1p(np.exp(-h_real)) + np.log1p(np.exp(h_fake))
    else:
        wanted = np.maximum(0, 1 - h_real) + np.maximum(0, 1 + h_fake)
    wanted = wanted + penalty * np.square(h_real - h_moved)
    assert found.item() == pytest.approx(wanted.mean(), rel=1e-9)
    assert float(numbers["head_real"]) == pytest.approx(h_real.mean(), rel=1e-8)
    assert float(numbers["head_fake"]) == pytest.approx(h_fake.mean(), rel=1e-8)
    assert judge.forwards == 2 + (penalty > 0)


@pytest.mark.parametrize(("loss", "penalty"), [("softplus", 0.0), ("hinge", 0.0), ("softplus", 0.7)])
@pytest.mark.parametrize("case", THREE, ids=str)
def test_what_the_head_learns(case: Case, loss: str, penalty: float) -> None:
    check_head_loss(discriminator, case, loss, penalty)


def test_rows_asked_one_after_the_other_are_judged_the_same() -> None:
    world = World(CASES[4])
    judge = made(discriminator, world, filled(), penalty=0.5)
    together, apart = (
        judge.head_loss(world.denoise, replace(world.batch(), sliced=sliced), drawn(seed=5), drawn(seed=6))[0].item()
        for sliced in (False, True)
    )
    assert together == pytest.approx(apart, rel=1e-12)


@pytest.mark.parametrize("case", THREE, ids=str)
def test_the_log_ratio_of_the_densities_is_its_best(case: Case) -> None:
    """d E[L_H] / d scale = 0 at scale 1, and at neither side of it: of 2,000 pictures of each kind, within four
    standard errors."""
    world, count = World(case, seed=2), 500
    cond = Cond.concat([world.cond] * count)
    batch = world.batch(cond=cond)
    real, fake = (
        torch.from_numpy(world.mean(role, cond)).view(-1, *SHAPE) + TAU * batch.normal(role)
        for role in ("teacher", "student")
    )
    for scale, wanted in ((0.5, -1), (1.0, 0), (2.0, 1)):
        head = BestHead(world, scale=scale)
        h = head.scale.detach().clone()
        loss, _ = made(discriminator, world, head).head_loss(world.denoise, batch, real, fake)
        slope = float(torch.autograd.grad(loss, head.scale)[0])
        # its deviation, from H* of each picture: d loss / d scale = -sigmoid(-h H_r) H_r + sigmoid(h H_f) H_f
        a, s = case.alpha, case.sigma
        h_real, h_fake = (
            best(world, a * rows(x) + s * rows(batch.normal(noise)), cond)
            for x, noise in ((real, "head real noise"), (fake, "head fake noise"))
        )
        each = -sigmoid(-float(h) * h_real) * h_real + sigmoid(float(h) * h_fake) * h_fake
        error = each.std() / np.sqrt(len(each))
        assert slope == pytest.approx(each.mean(), rel=1e-6, abs=1e-9)
        assert abs(slope) < 4 * error if wanted == 0 else wanted * slope > 4 * error, (scale, slope, error)


# -- the head itself --------------------------------------------------------------------------------------------------


def filled(cells: bool = False, channels: Sequence[int] = (2,)) -> Head:
    """A head in float64 that has learnt something."""
    head, draw = Head(channels, 8, cells, seed=1).double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in head.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=draw, dtype=torch.float64))
    return head


@pytest.mark.parametrize("cells", [False, True])
def test_a_heads_answer(cells: bool) -> None:
    """By hand: the convolution as a sum over its places, the norm over all of a group, the leaky ReLU."""
    head, value = filled(cells), drawn(3)
    weights = {name: entry.detach().numpy() for name, entry in head.named_parameters()}
    padded = np.pad(value.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    h = np.einsum("bcij,ocij->bo", padded[:, :, :3, :3], weights["enter.0.weight"]) + weights["enter.0.bias"]
    h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)  # one group of eight channels
    h = h * weights["norm.0.weight"] + weights["norm.0.bias"]
    h = np.where(h > 0, h, 0.2 * h)
    wanted = h @ weights["leave.0.weight"].reshape(8) + weights["leave.0.bias"]
    np.testing.assert_allclose(head([value])[0].detach().numpy()[:, 0], wanted, rtol=1e-10)
    several = filled(cells, (2, 5))([torch.ones(3, 2, 4, 6).double(), torch.ones(3, 5, 2, 2).double()])
    assert [tuple(part.shape) for part in several] == ([(3, 6), (3, 1)] if cells else [(3, 1), (3, 1)])


def test_a_new_head_cannot_tell_and_is_the_same_for_one_seed() -> None:
    one, same, other = (Head((4, 3), 16, seed=seed) for seed in (1, 1, 2))
    before = torch.get_rng_state()
    values = [torch.randn(2, 4, 5, 3), torch.randn(2, 3, 1, 1)]
    assert all(not bool(part.any()) for part in one(values))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.enter[0].weight, other.enter[0].weight)
    torch.set_rng_state(before)


@pytest.mark.parametrize("width", [8, 12, 64, 100, 256])
def test_a_feature_of_one_cell_is_not_normed_away(width: int) -> None:
    head, draw = Head((3,), width), torch.Generator().manual_seed(1)
    with torch.no_grad():
        head.leave[0].weight.copy_(torch.randn(head.leave[0].weight.shape, generator=draw))
    found = head([torch.randn(4, 3, 1, 1, generator=draw)])[0]
    assert float(found.std()) > 0.05 and width // head.norm[0].num_groups >= 8


MUTANTS = {
    "the student's the wrong way": ("generator=lambda h: softplus(-h)", "generator=lambda h: softplus(h)"),
    "real and fake exchanged": (
        "GanLoss(real=lambda h: softplus(-h), fake=softplus",
        "GanLoss(real=softplus, fake=lambda h: softplus(-h)",
    ),
    "no elements": ("x[0].numel() * loss.sum()", "loss.sum()"),
    "a mean over samples": ("x[0].numel() * loss.sum()", "x[0].numel() * loss.mean()"),
    "noise of another term": ('batch.normal("gan noise")', 'batch.normal("head fake noise")'),
    "the student's features": ("denoise.roles.use(TEACHER)", 'denoise.roles.use("student")'),
    "the fake as the real": ("add_noise(schedule, real, noise, sigma)", "add_noise(schedule, fake, noise, sigma)"),
    "one noise for both": ('batch.normal("head fake noise"), sigma', "noise, sigma"),
    "the penalty unweighted": ("self.penalty * averaged", "averaged"),
    "the penalty of the fake": ("zip(h_real, moved_logits", "zip(h_fake, moved_logits"),
    "the penalty's noise": ("self.spread * batch", "batch"),
    "a sum over blocks": (".mean(0)", ".sum(1).mean(0)"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_loss_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.discriminator", *change, monkeypatch)

    def check(mutated: ModuleType) -> None:
        check_cotangent(mutated, CASES[4], "softplus")
        check_head_loss(mutated, CASES[4], "softplus", 0.7)

    must_fail(check, module)
