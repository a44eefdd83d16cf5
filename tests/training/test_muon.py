"""Muon for matrices beside AdamW for all else: its step by hand, its state, and where torch has none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from onestep.core.errors import OneStepError
from onestep.training.engine import optimizer as adam
from onestep.training.methods import settings_for

SHAPES = ((6, 4), (3, 8), (5,), (2, 3, 1, 1))
LR = 1e-2
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason=f"torch {torch.__version__} has no Muon")


def parameters(seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw).requires_grad_() for shape in SHAPES]


def made(tensors: list[Tensor], weight_decay: float = 0.0) -> torch.optim.Optimizer:
    return adam.make(tensors, settings_for(optimizer="muon", learning_rate=LR, weight_decay=weight_decay))


def give(tensors: list[Tensor], step: int) -> list[Tensor]:
    """Gradients of a step."""
    draw = torch.Generator().manual_seed(100 + step)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=draw)
    return [tensor.grad.clone() for tensor in tensors if tensor.grad is not None]


@needs_muon
def test_a_matrix_moves_by_an_orthogonal_one_as_far_as_adamw_would() -> None:
    """arXiv:2502.16982, Eq. 4: W <- W (1 - lr d) - 0.2 lr sqrt(max(rows, columns)) O, O = U V^T of Nesterov's moment
    U S V^T; its Newton-Schulz steps leave singular values between about 0.7 and 1.2."""
    tensors = parameters()
    optimizer, moments = made(tensors, weight_decay=0.1), [np.zeros(shape) for shape in SHAPES]
    for step in (1, 2):
        before = [tensor.detach().double().numpy().copy() for tensor in tensors]
        for index, g in enumerate(give(tensors, step)):
            moments[index] = 0.9 * moments[index] + 0.1 * g.double().numpy()
        gradients = [tensor.grad.double().numpy() for tensor in tensors if tensor.grad is not None]
        optimizer.step()
        for index in (0, 1):
            u, _, vt = np.linalg.svd(0.9 * moments[index] + 0.1 * gradients[index], full_matrices=False)
            moved = before[index] * (1 - LR * 0.1) - tensors[index].detach().double().numpy()
            within = u.T @ (moved / (0.2 * LR * np.sqrt(max(SHAPES[index])))) @ vt.T
            np.testing.assert_allclose(np.diag(within), 1, atol=0.35)
            np.testing.assert_allclose(within - np.diag(np.diag(within)), 0, atol=0.05)


@needs_muon
def test_all_else_moves_as_under_adamw() -> None:
    tensors, alone = parameters(), parameters()[2:]
    ours, theirs = made(tensors), torch.optim.AdamW(alone, lr=LR, betas=(0.9, 0.99), weight_decay=0)
    for step in (1, 2, 3):
        give(tensors, step)
        for mine, other in zip(tensors[2:], alone, strict=True):
            other.grad = mine.grad.clone()  # type: ignore[union-attr]
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = LR / step
            optimizer.step()
    for mine, other in zip(tensors[2:], alone, strict=True):
        assert torch.equal(mine, other)


@needs_muon
def test_the_step_size_and_the_decay_of_the_moment_are_those_of_the_moment() -> None:
    """A trainer sets both before each step: at 0 nothing moves, and at betas[0] = 0 the first gradient is forgotten."""
    still, first, second = parameters(), parameters(), parameters()
    optimizer = made(still)
    give(still, 1)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(still, parameters(), strict=True))
    for tensors, earlier in ((first, 1), (second, 2)):
        optimizer = made(tensors)
        optimizer.param_groups[0]["betas"] = (0.0, 0.99)
        give(tensors, earlier)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        give(tensors, 3)
        optimizer.param_groups[0]["lr"] = LR
        optimizer.step()
    assert all(torch.equal(first[at], second[at]) for at in (0, 1))
    assert not torch.equal(first[0], parameters()[0])


@needs_muon
def test_the_state_goes_on_to_the_bit() -> None:
    through, ours = parameters(), parameters()
    whole, first = made(through), made(ours)
    for step in (1, 2):
        for tensors, optimizer in ((through, whole), (ours, first)):
            give(tensors, step)
            optimizer.step()
    tensors, numbers = adam.pack(first, "student")
    again = made(ours)
    adam.unpack(again, "student", tensors, json.loads(json.dumps(numbers)))
    for step in (3, 4):
        for values, optimizer in ((through, whole), (ours, again)):
            give(values, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(through, ours, strict=True))
    assert [float(again.state[p]["step"]) for p in ours] == [4] * len(SHAPES)


@needs_muon
@pytest.mark.parametrize("only", ([0, 1], [2, 3]), ids=("matrices", "no matrices"))
def test_one_kind_alone(only: list[int]) -> None:
    tensors = [parameters()[at] for at in only]
    optimizer = made(tensors)
    give(tensors, 1)
    optimizer.step()
    assert all(float(optimizer.state[tensor]["step"]) == 1 for tensor in tensors)


def test_a_torch_without_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "Muon", object, raising=False)
    adam.refuse_missing(settings_for(optimizer="muon"))
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(OneStepError, match="torch has from 2.9 on"):
        adam.refuse_missing(settings_for(optimizer="muon"))
