"""A trainer: one gradient however a batch is cut, memory that runs out, numbers that are none, the plan of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from narrowed import narrowed
from small_host import SmallHost, setup_of, small
from torch import Tensor

from onestep.core.memory import OutOfMemory
from onestep.training.engine import optimizer as adam
from onestep.training.engine.student import add_student, generate
from onestep.training.engine.trainer import Trainer
from onestep.training.engine.turns import Turn
from onestep.training.methods import METHODS, settings_for
from onestep.training.methods.dmd import dmd
from onestep.training.runs.state import restore, snapshot
from onestep.training.settings import Settings


@contextmanager
def trainer(folder: Path, settings: Settings, host: SmallHost | None = None) -> Iterator[Trainer]:
    """A trainer as a run makes it, its hooks installed."""
    host = host or SmallHost()
    setup = setup_of(host, settings, folder)
    add_student(host, settings, None)
    host.denoiser.roles.copy("student", "ema")
    plan = METHODS[settings.method].plan(setup)
    with host.denoiser.roles.installed():
        yield Trainer(host, settings, setup.recipe, setup.prompts, plan)


def turn(made: Trainer, name: str) -> Turn:
    """The regression of the warm start, or a role's last turn of an update."""
    phases = {phase.name: phase.turns for phase in made.plan.phases}
    if name == "regression":
        return phases.get("warm start", made.plan.phases[0].turns)[0]
    return [turn for turn in made.plan.phases[-1].turns if turn.role == name][-1]


def away_from_zero(made: Trainer) -> None:
    """B = 0 would hide A's gradient."""
    for role in made.host.denoiser.roles.names():
        draw = torch.Generator().manual_seed(5)
        for _, b in made.host.denoiser.roles.state(role).values():
            b.copy_(0.3 * torch.randn(b.shape, generator=draw))


def gradients(made: Trainer, name: str, update: int = 0) -> tuple[list[Tensor], dict[str, float]]:
    """Of one `turn`'s loss, and its numbers."""
    chosen = turn(made, name)
    numbers = made.accumulate(chosen, update)
    return [factor.grad.clone() for factor in made.host.denoiser.roles.parameters(chosen.role)], numbers  # type: ignore[union-attr]


def near(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """To 1e-4 of each gradient's norm: float32, and an eps network that divides by a small alpha."""
    return all(float((f - w).norm()) <= 1e-4 * float(w.norm()) for f, w in zip(found, wanted, strict=True))


LOSSES = ["regression", "critic", "student"]


# -- micro-batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("accumulation", [2, 3, 4])
@pytest.mark.parametrize("method", ["dmd", "vsd"])
def test_micro_batches_give_the_gradient_of_the_batch(
    tmp_path: Path, loss: str, accumulation: int, method: str
) -> None:
    """The same samples, prompts, noise and levels: the sum over micro-batches is the whole, uneven ones too."""
    found = []
    for count in (1, accumulation):
        with trainer(tmp_path / str(count), small(method=method, batch=4, anchor=0.5)) as made:
            away_from_zero(made)
            made.accumulation = count
            sizes = [len(batch) for batch in made.batches(0)]
            assert sum(sizes) == 4 and len(sizes) == {1: 1, 2: 2, 3: 2, 4: 4}[count]
            found.append(gradients(made, loss))
    (whole, numbers), (parts, counted) = found
    assert near(parts, whole)
    for name in ("regression", "critic"):
        assert counted.get(name, 0) == pytest.approx(numbers.get(name, 0), rel=1e-4)


def test_the_matching_gradient_is_a_sum_over_elements_and_a_mean_over_samples(tmp_path: Path) -> None:
    """<x, G> / batch: a clip of 1 means something, whatever the size of the latents and of the batch."""
    with trainer(tmp_path, small(batch=4)) as made:
        away_from_zero(made)
        got, _ = gradients(made, "student")
        objective, host = dmd(made.settings), made.host
        batch = next(iter(made.batches(0)))
        x = generate(host.denoiser, made.recipe, batch)
        g, _ = objective.cotangent(host.denoiser, batch, x)
        parameters = host.denoiser.roles.parameters("student")
        wanted = torch.autograd.grad((x * g).flatten(1).sum(1).mean(), parameters)
    assert near(got, list(wanted))


def test_the_anchor_is_that_much_of_the_regression(tmp_path: Path) -> None:
    """G(anchor) = G(0) + anchor * the gradient of the regression on this update's pairs."""
    found = {}
    for anchor in (0.0, 0.5):
        with trainer(tmp_path / str(anchor), small(anchor=anchor)) as made:
            away_from_zero(made)
            found[anchor], _ = gradients(made, "student", 9)
            regression, _ = gradients(made, "regression", 9)
    assert near(found[0.5], [alone + 0.5 * pull for alone, pull in zip(found[0.0], regression, strict=True)])


def test_only_the_role_in_turn_is_moved(tmp_path: Path) -> None:
    with trainer(tmp_path, small(warm_start=0, critic_warm_up=1, ema=0.9)) as made:
        roles = made.host.denoiser.roles
        before = {role: [f.detach().clone() for f in roles.parameters(role)] for role in roles.names()}
        base = [p.clone() for p in made.host.network.parameters()]  # type: ignore[attr-defined]

        def moved() -> set[str]:
            pairs = {role: zip(before[role], roles.parameters(role), strict=True) for role in before}
            return {role for role in pairs if any(not torch.equal(then, now) for then, now in pairs[role])}

        made.step(0)
        assert made.plan.at(0)[0].name == "critic" and moved() == {"critic"}
        made.step(1)
        assert made.plan.at(1)[0].name == "dmd" and moved() == {"critic", "student", "ema"}
        assert all(torch.equal(then, now) for then, now in zip(base, made.host.network.parameters(), strict=True))  # type: ignore[attr-defined]


# -- memory runs out --------------------------------------------------------------------------------------------------


def runs_out(host: SmallHost, above: int, at: int = 1) -> list[int]:
    """A device that holds no more than ``above`` rows of a forward with gradients; from its ``at``-th forward on."""
    calls: list[int] = []

    def hook(module: Any, args: tuple[Any, ...]) -> None:
        calls.append(len(args[0]))
        if torch.is_grad_enabled() and len(args[0]) > above and len(calls) >= at:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    host.network.register_forward_pre_hook(hook)
    return calls


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("above", "accumulation"), narrowed([(3, 2), (2, 2), (1, 4)], (3, 2), (1, 4)))
def test_out_of_memory_halves_the_micro_batch(tmp_path: Path, loss: str, above: int, accumulation: int) -> None:
    """All samples are still seen, once each: the gradient is that of the whole batch."""
    with trainer(tmp_path / "whole", small()) as made:
        away_from_zero(made)
        wanted, _ = gradients(made, loss)
    host = SmallHost()
    with trainer(tmp_path / "halved", small(), host) as made:
        away_from_zero(made)
        runs_out(host, above)
        got, _ = gradients(made, loss)
        assert made.accumulation == accumulation
        assert made.notes[-1] == f"out of memory: micro-batches of {4 // accumulation} from here on"
        assert len(made.notes) == int(math.log2(accumulation))
        gradients(made, loss, 3)
        assert len(made.notes) == int(math.log2(accumulation)), "said once, and not tried again"
    assert near(got, wanted)


def test_out_of_memory_at_one_sample_is_the_end(tmp_path: Path) -> None:
    host = SmallHost()
    with trainer(tmp_path, small(), host) as made:
        runs_out(host, 0)
        with pytest.raises(OutOfMemory, match="out of memory in the student's step, with one sample at a time"):
            made.step(0)
        assert made.accumulation == 4 and made.whole


def test_out_of_memory_in_the_middle_of_a_step_takes_nothing_twice(tmp_path: Path) -> None:
    """The second micro-batch fails: the first one's gradient is thrown away with it."""
    with trainer(tmp_path / "whole", small(accumulation=2)) as made:
        away_from_zero(made)
        wanted, _ = gradients(made, "critic")
    host = SmallHost()
    with trainer(tmp_path / "failed", small(accumulation=2), host) as made:
        away_from_zero(made)
        runs_out(host, 1, at=3)
        got, _ = gradients(made, "critic")
        assert made.accumulation == 4
    assert near(got, wanted)


# -- numbers that are none --------------------------------------------------------------------------------------------


def spoil(made: Trainer, role: str, where: str) -> None:
    """The role's loss (or only its gradient) becomes NaN, as a half-precision overflow would make it."""

    def hook(module: Any, args: Any, output: Tensor) -> Tensor | None:
        if made.host.denoiser.roles.active.blocks != ((role, None),) or not output.requires_grad:
            return None
        if where == "loss":
            return output * math.nan
        output.register_hook(lambda gradient: gradient * math.inf)
        return None

    made.host.network.register_forward_hook(hook)  # type: ignore[attr-defined]


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("role", ["student", "critic"])
def test_a_step_of_no_numbers_is_dropped_and_counted(tmp_path: Path, role: str, where: str) -> None:
    """That role's factors, moments and mean stay as they are; the other role goes on."""
    with trainer(tmp_path, small(warm_start=0, critic_warm_up=0)) as made:
        roles = made.host.denoiser.roles
        spoil(made, role, where)
        watched = [role] if role == "critic" else ["student", "ema"]
        before = [f.detach().clone() for name in watched for f in roles.parameters(name)]
        for update in range(3):
            made.step(update)
        after = [f for name in watched for f in roles.parameters(name)]
        assert all(torch.equal(then, now) for then, now in zip(before, after, strict=True))
        steps = 3 * (2 if role == "critic" else 1)
        assert made.bad[role] == made.dropped == made.stuck == steps
        assert made.bad["student" if role == "critic" else "critic"] == 0
        assert not made.optimizers[role].state
        assert all(f.grad is None for name in roles.names() for f in roles.parameters(name))


def test_a_good_step_starts_the_count_anew(tmp_path: Path) -> None:
    with trainer(tmp_path, small(warm_start=5)) as made:
        for update in range(3):  # the teacher's pairs, while it can still answer
            made.accumulate(turn(made, "regression"), update)
        handle = made.host.network.register_forward_hook(lambda *args: args[2] * math.nan)  # type: ignore[attr-defined]
        made.step(0)
        made.step(1)
        assert made.stuck == made.dropped == 2
        handle.remove()
        made.step(2)
        assert (made.stuck, made.dropped) == (0, 2)


# -- step sizes and moments -------------------------------------------------------------------------------------------


def test_the_step_size_rises_and_falls() -> None:
    """Linear over the warm-up, then half a cosine from the height to a tenth of it."""
    settings = settings_for(warm_up=10, final_rate=0.1)
    for update in (0, 4, 9, 10, 50, 99):
        rise = min(1, (update + 1) / 10)
        fall = 0.1 + 0.9 * (1 + np.cos(np.pi * update / 100)) / 2
        assert adam.rate(update, 100, 2e-4, settings) == pytest.approx(2e-4 * rise * fall)
    assert adam.rate(10**6, 100, 1.0, settings) == pytest.approx(0.1)


def test_an_update_is_adams(tmp_path: Path) -> None:
    """AdamW (arXiv:1711.05101, Algorithm 2) on the clipped gradient, by hand, for two updates."""
    settings = small(method="regression", steps=9, warm_up=1, final_rate=1.0, max_grad_norm=0.5, weight_decay=0.1)
    with trainer(tmp_path, settings) as made:
        parameters = made.host.denoiser.roles.parameters("student")
        theta = [p.detach().double().numpy().copy() for p in parameters]
        m, v = [np.zeros_like(t) for t in theta], [np.zeros_like(t) for t in theta]
        for step in (1, 2):
            raw, _ = gradients(made, "regression", step - 1)
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in raw))
            assert norm > 0.5
            numbers = made.step(step - 1)
            assert numbers["student_norm"] == pytest.approx(norm, rel=1e-5)
            for i, g in enumerate(g.double().numpy() * (0.5 / norm) for g in raw):
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.99 * v[i] + 0.01 * g**2
                m_hat, v_hat = m[i] / (1 - 0.9**step), v[i] / (1 - 0.99**step)
                theta[i] = theta[i] * (1 - 1e-2 * 0.1) - 1e-2 * m_hat / (np.sqrt(v_hat) + 1e-8)
            for found, wanted in zip(parameters, theta, strict=True):
                np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=2e-4, atol=2e-6)


def test_the_mean_is_short_at_first_then_long(tmp_path: Path) -> None:
    """Decay min(ema, (1 + n) / (10 + n)) after n updates, of the factors."""
    with trainer(tmp_path, small(method="regression", steps=9, ema=0.15)) as made:
        roles = made.host.denoiser.roles
        mean = [f.detach().clone() for f in roles.parameters("ema")]
        for n, decay in ((1, 0.15), (2, 0.15)):
            made.step(n - 1)
            assert decay == min(0.15, (1 + n) / (10 + n))
            mean = [
                decay * then + (1 - decay) * now.detach()
                for then, now in zip(mean, roles.parameters("student"), strict=True)
            ]
            torch.testing.assert_close([f.detach() for f in roles.parameters("ema")], mean, rtol=1e-5, atol=1e-6)


def test_the_critic_follows_where_it_is_told_to(tmp_path: Path) -> None:
    found = []
    for follow in (0.0, 1.0):
        with trainer(tmp_path / str(follow), small(warm_start=1, critic_warm_up=0, follow=follow)) as made:
            made.step(0)
            roles = made.host.denoiser.roles
            pairs = zip(roles.parameters("critic"), roles.parameters("student"), strict=True)
            found.append(all(torch.equal(c, s) for c, s in pairs))
    assert found == [False, True]


# -- the plan and the state -------------------------------------------------------------------------------------------


def test_the_plan_of_a_run(tmp_path: Path) -> None:
    with trainer(tmp_path, small(warm_start=2, critic_warm_up=1, steps=2)) as made:
        plan = made.plan
        found = [(plan.at(update)[0].name, plan.at(update)[1]) for update in range(plan.updates)]
        assert found == [("warm start", 0), ("warm start", 1), ("critic", 0), ("dmd", 0), ("dmd", 1)]
        turns = {phase.name: [turn.role for turn in phase.turns] for phase in plan.phases}
        assert turns == {"warm start": ["student"], "critic": ["critic"], "dmd": ["critic", "critic", "student"]}
        with pytest.raises(IndexError):
            plan.at(plan.updates)
    for changes, total in [({"method": "regression", "steps": 5}, 5), ({"steps": 0, "warm_start": 4}, 4)]:
        with trainer(tmp_path, small(**changes)) as made:
            assert made.plan.updates == total


def test_no_two_turns_see_the_same_batch(tmp_path: Path) -> None:
    """Each turn of each update has a key, hence noise, prompts and levels, of its own."""
    with trainer(tmp_path, small()) as made:
        keys: list[int] = []
        made.batches = lambda key: keys.append(key) or iter(())  # type: ignore[method-assign, assignment, func-returns-value]
        made._apply = lambda *args: 0.0  # type: ignore[method-assign]
        for update in range(made.plan.updates):
            made.step(update)
        assert len(set(keys)) == len(keys) == 3 + 2 + 4 * 3


def test_a_state_holds_all_that_a_step_depends_on(tmp_path: Path) -> None:
    """Snapshot, go on, restore into a trainer made anew: the same steps to the last bit, moments and counters too."""
    settings = small(method="vsd", follow=0.1, anchor=0.3)
    with trainer(tmp_path / "a", settings) as made:
        for update in range(6):
            made.step(update)
        made.notes.append("a note")
        tensors, notes = snapshot(made)
        tensors = {name: value.clone() for name, value in tensors.items()}
        numbers = [made.step(update) for update in (6, 7)]
        wanted = snapshot(made)
    with trainer(tmp_path / "b", settings) as made:
        restore(made, tensors, notes)
        assert made.notes == ["a note"]
        assert [made.step(update) for update in (6, 7)] == numbers
        found = snapshot(made)
    assert found[1] == wanted[1] and found[0].keys() == wanted[0].keys()
    assert all(torch.equal(found[0][name], wanted[0][name]) for name in wanted[0])
