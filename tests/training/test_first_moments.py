"""Adam without a first moment where its decay is 0: the same steps to the bit, and nothing kept that is not read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_host import SmallHost, setup_of, small
from torch import Tensor
from whole_runs import newest, run

from onestep.core.tensor_file import read_tensors, write_tensors
from onestep.training.engine import optimizer as adam
from onestep.training.engine.student import add_student
from onestep.training.engine.trainer import Trainer
from onestep.training.engine.turns import Phase, Plan, Turn
from onestep.training.methods import METHODS, settings_for

SHAPES = ((6, 4), (3, 8), (5,), (2, 3, 3, 3))
LR, DECAY = 1e-2, 0.05
FIRST = ("exp_avg", "momentum_buffer", "state1", "absmax1")
LARGE = ((64, 72), (3, 5), (4097,), (16, 4, 32, 3))
"""Above and below the 4096 numbers from which on bitsandbytes keeps 8 bits."""


def parameters(shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]


def gradients(number: int, shapes: Sequence[torch.Size | tuple[int, ...]] = SHAPES) -> list[Tensor]:
    draw = torch.Generator().manual_seed(100 + number)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def step(optimizer: torch.optim.Optimizer, tensors: list[Tensor], number: int, beta: float) -> None:
    given = gradients(number, [tensor.shape for tensor in tensors])
    for tensor, gradient in zip(tensors, given, strict=True):
        tensor.grad = gradient.clone()
    optimizer.param_groups[0] |= {"betas": (beta, 0.99), "lr": LR / (1 + number)}
    optimizer.step()
    assert all(torch.equal(t.grad, g) for t, g in zip(tensors, given, strict=True))  # type: ignore[arg-type]


def ours(tensors: list[Tensor], kind: str = "adamw") -> torch.optim.Optimizer:
    return adam.make(tensors, settings_for(optimizer=kind, learning_rate=LR, weight_decay=DECAY))


BETAS = {"none": [0.0] * 5, "some, then none": [0.9, 0.9, 0.0, 0.0, 0.0], "some": [0.9] * 4}


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
@pytest.mark.parametrize("form", [{}, {"fused": True}, {"foreach": True}], ids=["plain", "fused", "foreach"])
def test_it_steps_as_torchs_adamw_to_the_bit(betas: Sequence[float], form: dict[str, bool]) -> None:
    mine, theirs = parameters(), parameters()
    options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, **form}
    optimizer, torchs = adam.AdamW(mine, **options), torch.optim.AdamW(theirs, **options)
    for number, beta in enumerate(betas):
        step(optimizer, mine, number, beta)
        step(torchs, theirs, number, beta)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), number
        assert all(("exp_avg" in optimizer.state[value]) is (beta > 0) for value in mine)


def test_without_a_decay_it_is_the_gradient_over_its_own_size() -> None:
    """arXiv:1412.6980, Algorithm 1 with beta1 = 0, decoupled weight decay (arXiv:1711.05101, Algorithm 2), in NumPy."""
    tensors = parameters()
    optimizer, second = ours(tensors), [np.zeros(shape) for shape in SHAPES]
    for number in range(4):
        before, lr = [tensor.detach().double().numpy().copy() for tensor in tensors], LR / (1 + number)
        step(optimizer, tensors, number, 0.0)
        for index, gradient in enumerate(gradients(number)):
            g = gradient.double().numpy()
            second[index] = 0.99 * second[index] + 0.01 * g**2
            size = np.sqrt(second[index] / (1 - 0.99 ** (number + 1))) + 1e-8
            wanted = before[index] * (1 - lr * DECAY) - lr * g / size
            np.testing.assert_allclose(tensors[index].detach().numpy(), wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_first_moment_that_begins_late_begins_as_at_the_first_step(kind: str) -> None:
    """m_n = (1 - b^n) g_n: after its own correction it is the gradient, as a run's first moment is."""
    if kind == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    tensors = parameters()
    optimizer = ours(tensors, kind)
    for number, beta in enumerate((0.0, 0.0, 0.9)):
        step(optimizer, tensors, number, beta)
        assert any(name in optimizer.state[tensors[0]] for name in FIRST) is (beta > 0)
    for value, gradient in zip(tensors, gradients(2), strict=True):
        moment = next(optimizer.state[value][name] for name in FIRST if name in optimizer.state[value])
        torch.testing.assert_close(moment, gradient * (1 - 0.9**3))


def test_a_state_of_before_that_has_first_moments_goes_on(tmp_path: Path) -> None:
    """What torch's AdamW left, with moments that are the last gradients, and without them."""
    theirs = parameters()
    torchs = torch.optim.AdamW(theirs, lr=LR, weight_decay=DECAY, betas=(0.0, 0.99))
    for number in range(3):
        step(torchs, theirs, number, 0.0)
    packed, numbers = adam.pack(torchs, "critic")
    assert "critic.0.exp_avg" in packed
    write_tensors(tmp_path / "state.safetensors", packed)
    kept = read_tensors(tmp_path / "state.safetensors")
    for tensors in (kept, {name: value for name, value in kept.items() if not name.endswith("exp_avg")}):
        mine, through = ([value.detach().clone().requires_grad_() for value in theirs] for _ in range(2))
        optimizer = ours(mine)
        adam.unpack(optimizer, "critic", tensors, numbers)
        assert adam.steps_of(optimizer) == 3
        whole = torch.optim.AdamW(through, lr=LR, weight_decay=DECAY)
        adam.unpack(whole, "critic", kept, numbers)
        for number in (3, 4):
            step(optimizer, mine, number, 0.0)
            step(whole, through, number, 0.0)
        assert all(torch.equal(a, b) for a, b in zip(mine, through, strict=True))
        assert "critic.0.exp_avg" not in adam.pack(optimizer, "critic")[0]


@pytest.mark.parametrize("method, kept", [("dmd", set()), ("regression", {"student"})])
def test_a_runs_state_holds_no_gradient_as_a_moment(tmp_path: Path, method: str, kept: set[str]) -> None:
    """dmd: the critic never has a decay, the student none after its warm start."""
    run(tmp_path / "run", small(method=method, watch_every=0, preview_every=0, steps=2))
    names = read_tensors(newest(tmp_path / "run") / "state.safetensors")
    assert {name.split(".")[0] for name in names if name.endswith(FIRST)} == kept
    assert any(name.endswith("exp_avg_sq") for name in names)


# -- freed before the first backward that could do without ------------------------------------------------------------


def turn(role: str, beta1: float) -> Turn:
    return Turn(role, lambda batch, share, update: {}, 1e-3, beta1)


@pytest.mark.parametrize(
    ("phases", "kept"),
    [
        # a warm start, the critic alone, both: the student's next turn tells
        ([(2, ["s.9"]), (1, ["c0"]), (2, ["c0", "s0"])], {"s": "11000", "c": "00000"}),
        ([(2, ["s.9"]), (0, ["s0"]), (3, ["s.9"])], {"s": "11111"}),
        ([(1, ["s0"]), (2, ["s0", "s.5"])], {"s": "011"}),
        ([(2, ["s.9", "c0"]), (2, ["c.9"])], {"s": "1111", "c": "0011"}),
    ],
)
def test_a_first_moment_is_read_by_the_next_turn_or_not(
    phases: list[tuple[int, list[str]]], kept: dict[str, str]
) -> None:
    plan = Plan(
        ["s", "c"],
        [Phase(str(n), count, [turn(t[0], float(t[1:])) for t in turns]) for n, (count, turns) in enumerate(phases)],
    )
    for role, wanted in kept.items():
        found = [plan.first_moment(role, update) for update in range(plan.updates)]
        assert found == [letter == "1" for letter in wanted[: plan.updates]]


@pytest.mark.parametrize("kind", ["adamw", "muon", "adamw8bit"])
def test_a_warm_starts_first_moments_are_gone_as_the_next_phase_begins(tmp_path: Path, kind: str) -> None:
    """At every micro-step, before its forward: none but while the warm start's own turns go on."""
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    if kind == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    settings = small(optimizer=kind, rank=64, watch_every=0, preview_every=0, steps=2, warm_start=3, critic_warm_up=2)
    host = SmallHost()
    setup = setup_of(host, settings, tmp_path)
    add_student(host, settings, None)
    host.denoiser.roles.copy("student", "ema")
    trainer = Trainer(host, settings, setup.recipe, setup.prompts, METHODS["dmd"].plan(setup))
    seen: list[tuple[str, int, bool]] = []

    def poll() -> None:
        held = [name for entries in trainer.optimizers["student"].state.values() for name in entries if name in FIRST]
        seen.append((trainer.plan.at(update)[0].name, update, bool(held)))

    host.on_poll = poll
    with host.denoiser.roles.installed():
        for update in range(trainer.plan.updates):
            trainer.step(update)
    assert all(held is (phase == "warm start" and update > 0) for phase, update, held in seen)
    assert {phase for phase, _, _ in seen} == {"warm start", "critic", "dmd"}


# -- 8 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
def test_eight_bits_step_as_bitsandbytes_to_the_bit(betas: Sequence[float]) -> None:
    package = pytest.importorskip("bitsandbytes")
    mine, theirs = parameters(LARGE), parameters(LARGE)
    optimizer, whole = ours(mine, "adamw8bit"), package.optim.AdamW8bit(theirs, lr=LR, weight_decay=DECAY)
    for number, beta in enumerate(betas):
        step(optimizer, mine, number, beta)
        step(whole, theirs, number, beta)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), number
        for value in mine:
            assert any(name in optimizer.state[value] for name in FIRST) is (beta > 0)
            assert "state2" in optimizer.state[value]


def test_a_first_moment_of_eight_bits_that_begins_late_begins_as_at_the_first_step() -> None:
    """m_n = (1 - b^n) g_n, to what 8 bits hold of it."""
    package = pytest.importorskip("bitsandbytes")
    tensors = parameters(LARGE)
    optimizer = ours(tensors, "adamw8bit")
    for number, beta in enumerate((0.0, 0.0, 0.9)):
        step(optimizer, tensors, number, beta)
    for value, gradient in zip(tensors, gradients(2, LARGE), strict=True):
        entries, wanted = optimizer.state[value], gradient * (1 - 0.9**3)
        found = entries["state1"]
        if found.dtype is torch.uint8:
            found = package.functional.dequantize_blockwise(
                found, absmax=entries["absmax1"], code=entries["qmap1"], blocksize=256
            )
        torch.testing.assert_close(found, wanted, rtol=0.07, atol=0.02)
