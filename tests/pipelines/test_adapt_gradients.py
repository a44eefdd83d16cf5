"""Gradients through D: finite differences, checkpointing, and a role that changes between forward and backward."""

from __future__ import annotations

import pytest
import torch
from adapted import SIZE, noisy, with_student
from narrowed import narrowed
from tiny_pipelines import MAKERS, MODERN, make
from torch import Tensor

from onestep.core.checkpoint import checkpoint_blocks
from onestep.core.errors import OneStepError
from onestep.core.recomputed import GRADES, recomputed
from onestep.pipelines.adapt import adapt

SILENT = {
    "sd3": {"transformer_blocks.1.attn.add_q_proj"},
    "qwen_image": {
        *(f"transformer_blocks.1.attn.{layer}" for layer in ("add_q_proj", "to_add_out")),
        *(f"transformer_blocks.1.txt_mlp.net.{layer}" for layer in ("0.proj", "2")),
    },
}
"""What the last block makes of the text is thrown away."""

# diffusers rounds to float32 within: the rotation of queries and keys, SD3.5's norms of them
STEPS = [("sd", 1e-5, 1e-6), ("sdxl", 1e-5, 1e-6), *((name, 1e-3, 1e-3) for name in ("sd3", "flux", *MODERN))]


@pytest.mark.parametrize(
    ("name", "step", "tolerance"),
    narrowed(STEPS, *(case for case in STEPS if case[0] in ("sd", "sd3", "flux", "z_image", "wan"))),
)
@pytest.mark.parametrize("checkpointing", narrowed([False, True], True))
def test_gradient_of_d_is_the_finite_difference(name: str, step: float, tolerance: float, checkpointing: bool) -> None:
    host = adapt(make(name))
    host.network.double()
    parameters = with_student(host)
    x, cond = noisy(host, dtype=torch.float64), host.encode(["a cat", "red"], SIZE).to(torch.float64)
    sigma, weight = host.denoiser.schedule.sigma_at(torch.tensor([0.4, 0.8])), noisy(host, dtype=torch.float64)

    def loss() -> Tensor:
        return (weight * host.denoiser(x, sigma, cond)).sum()

    with host.training(), host.denoiser.roles.use("student"):
        blocks = host.blocks if checkpointing else []
        with checkpoint_blocks(blocks, host.denoiser.roles):
            value = loss()
            value.backward()
    gradients = [parameter.grad for parameter in parameters]
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    silent = [index for index, gradient in enumerate(gradients) if not gradient.any()]
    assert {sorted(host.denoiser.roles.targets)[index // 2] for index in silent} == SILENT.get(name, set())

    generator = torch.Generator().manual_seed(2)
    start = [parameter.detach().clone() for parameter in parameters]
    steps = [step * torch.randn(p.shape, generator=generator) for p in parameters]
    values, places = [], []
    with torch.no_grad(), host.denoiser.roles.use("student"):
        for sign in (1, -1):
            for parameter, at, move in zip(parameters, start, steps, strict=True):
                parameter.copy_(at + sign * move)
            values.append(loss())
            places.append([parameter.double() for parameter in parameters])
    # the parameters are float32: the step is what they really moved by
    moved = [high - low for high, low in zip(*places, strict=True)]
    slope = sum((gradient.double() * move).sum() for gradient, move in zip(gradients, moved, strict=True))
    # of a direction's chance slope, the gradients' length is the scale
    length = sum(gradient.double().square().sum() for gradient in gradients).sqrt()
    scale = float(length * sum(move.square().sum() for move in moved).sqrt()) / len(start) ** 0.5
    assert float(slope) == pytest.approx(float(values[0] - values[1]), rel=tolerance, abs=tolerance * scale)


@pytest.mark.parametrize("name", narrowed([*MAKERS, *MODERN], "sd", "sd3", "flux", "z_image", "wan"))
def test_checkpointed_gradients_are_the_same(name: str) -> None:
    """To the bit, whatever of the network is computed again."""
    host = adapt(make(name))
    parameters = with_student(host)
    x, cond = noisy(host), host.encode(["a cat", "red"], SIZE)
    sigma, found = host.denoiser.schedule.sigma_at(torch.tensor([0.4, 0.8])), []
    for grade in GRADES:
        blocks = recomputed(host.blocks, grade)
        with host.training(), host.denoiser.roles.use("student"), checkpoint_blocks(blocks, host.denoiser.roles):
            host.denoiser(x, sigma, cond).square().sum().backward()
        reached = [parameter for parameter in parameters if parameter.grad is not None]
        found.append([parameter.grad.clone() for parameter in reached])
        for parameter in parameters:
            parameter.grad = None
    assert any(gradient.any() for gradient in found[0])
    for plain, *again in zip(*found, strict=True):
        assert all(torch.equal(plain, other) for other in again)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_after_another_role_was_used_is_right_or_refused(checkpointing: bool) -> None:
    """peft gives None gradients here; recomputation would see the critic."""
    host = adapt(make("sd"))
    roles = host.denoiser.roles
    student, critic = with_student(host), with_student(host, "critic", 5)
    x, cond = noisy(host), host.encode(["a cat", "red"], SIZE)
    sigma = host.denoiser.schedule.sigma_at(torch.tensor([0.4, 0.8]))
    with host.training(), checkpoint_blocks(host.blocks if checkpointing else [], roles):
        with roles.use("student"):
            host.denoiser(x, sigma, cond).sum().backward()
        expected = [parameter.grad.clone() for parameter in student]
        for parameter in student:
            parameter.grad = None
        with roles.use("student"):
            loss = host.denoiser(x, sigma, cond).sum()
        with roles.use("critic"), torch.no_grad():
            host.denoiser(x, sigma, cond)
        loss.backward()
        with roles.use("student"):
            again = host.denoiser(x, sigma, cond).sum()
        with roles.use("critic"), pytest.raises(OneStepError, match="run backward"):
            again.backward()
    for parameter, gradient in zip(student, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(parameter.grad is None for parameter in critic)
