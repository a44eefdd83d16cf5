"""Roles by each implementation of their products: numbers and gradients as in float64, kernels really called."""

from __future__ import annotations

import copy

import pytest
import torch
from role_networks import Mixed, call, roles_on
from torch import Tensor

from onestep.core.roles import TEACHER
from onestep.kernels.add_lora import OP

BLOCKS = {"student": "student", "rows": [(TEACHER, 2), ("critic", 1), ("student", 3)]}


def passed(dtype: torch.dtype, blocks, grad: bool) -> list[Tensor]:
    """Output of a network with adapters and, with ``grad``, the gradients of x and of both roles' factors."""
    torch.manual_seed(0)
    network = copy.deepcopy(Mixed()).to(dtype).requires_grad_(False)
    roles = roles_on(network, student=1, critic=1)
    x = torch.randn(6, 3, 8, 8).to(dtype).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        out = call(roles, network, x, blocks)
    if not grad:
        return [out]
    factors = roles.parameters("student") + roles.parameters("critic")
    return [out, *torch.autograd.grad(out.square().sum(), [x, *factors], materialize_grads=True)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_roles_are_those_of_float64(blocks, grad, implementation, monkeypatch):
    calls = []
    run = OP.run
    monkeypatch.setattr(OP, "run", lambda part, like, *rest: calls.append(part) or run(part, like, *rest))
    ours, right = (passed(dtype, BLOCKS[blocks], grad) for dtype in (torch.float32, torch.float64))
    for mine, other in zip(ours, right, strict=True):
        assert (mine - other).abs().max() <= 1e-4 * other.abs().max().clamp_min(1e-3)
    if implementation == "triton":
        assert set(calls) == {"forward", "backward"} if grad else {"forward"}
