"""A base in float16: the critic's small gradients are kept by a constant loss scale, and an overflow drops the step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import narrowed
from small_host import setup_of, small
from tiny_pipelines import randomise, sd
from torch import Tensor

from onestep.pipelines.adapt import adapt
from onestep.training.engine.student import add_student
from onestep.training.engine.trainer import Trainer
from onestep.training.engine.turns import Turn, read
from onestep.training.methods import METHODS

MORE_ELEMENTS = 2.0**14


def critic_gradient(folder: Path, dtype: torch.dtype, scale: float | None = None) -> tuple[Tensor, Trainer, Turn]:
    """Of one critic's turn on a whole U-Net, flat; with another loss scale than the turn's own."""
    torch.manual_seed(0)
    pipe = sd()
    randomise(pipe.unet)
    pipe.unet.to(dtype)
    host: Any = adapt(pipe, device="cpu")
    settings = small(sizes="64x64", batch=2, accumulation=2, rank=2)
    setup = setup_of(host, settings, folder, ["a cat", "red"])
    add_student(host, settings, None)
    plan = METHODS["dmd"].plan(setup)
    trainer = Trainer(host, settings, setup.recipe, setup.prompts, plan)
    turn = next(turn for phase in plan.phases for turn in phase.turns if turn.role == "critic")
    # a mean over as many elements as large pictures have
    turn = replace(
        turn,
        loss=lambda batch, share, update, loss=turn.loss: loss(batch, share / MORE_ELEMENTS, update),  # type: ignore[misc]
    )
    if scale is not None:
        turn = replace(turn, half_scale=scale)
    for role in ("student", "critic"):
        for number, (_, b) in enumerate(host.denoiser.roles.state(role).values()):
            b.copy_(0.02 * torch.randn(b.shape, generator=torch.Generator().manual_seed(number)))
    with host.training():
        trainer.accumulate(turn, 0)
    values = [p.grad.flatten() for p in host.denoiser.roles.parameters("critic") if p.grad is not None]
    return torch.cat(values), trainer, turn


def lost(found: Tensor, wanted: Tensor) -> float:
    return float(((found == 0) & (wanted != 0)).float().mean())


def test_the_critics_gradient_is_kept(tmp_path: Path) -> None:
    """Fewer entries are lost than without a scale, and it points where float32's does."""
    wanted, whole, _ = critic_gradient(tmp_path / "a", torch.float32)
    scaled, half, turn = critic_gradient(tmp_path / "b", torch.float16)
    plain, _, _ = critic_gradient(tmp_path / "c", torch.float16, 1.0)
    assert turn.half_scale == 1024 and half.in_half and not whole.in_half
    assert lost(scaled, wanted) < 0.3 * lost(plain, wanted), (lost(scaled, wanted), lost(plain, wanted))
    assert float(torch.cosine_similarity(scaled, wanted, 0)) > 0.99
    assert float(scaled.norm() / wanted.norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("method", "role"),
    narrowed([("dmd2", "head"), ("dmd2", "student"), ("ladd", "head"), ("ladd", "student")], ("ladd", "student")),
)
def test_a_head_points_the_same_way(method: str, role: str, tmp_path: Path) -> None:
    """The head itself is in float32; what it looks at, and the student's way to it, are in float16."""
    found = {}
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        pipe = sd()
        randomise(pipe.unet)
        host: Any = adapt(pipe.to(dtype), device="cpu")
        own: dict[str, Any] = {"gan_weight": 1.0, "gan_start": 0.0, "gan_ramp": 0.0} if method == "dmd2" else {}
        settings = small(method=method, sizes="64x64", batch=2, pairs=2, rank=2, **own)
        setup = setup_of(host, settings, tmp_path / str(dtype), ["a cat", "red"])
        add_student(host, settings, None)
        plan = METHODS[method].plan(setup)
        turn = next(turn for turn in plan.phases[-1].turns if turn.role == role)
        generator = torch.Generator().manual_seed(1)
        for parameter in host.denoiser.roles.parameters("head"):  # it begins by saying nothing
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        with host.training():
            Trainer(host, settings, setup.recipe, setup.prompts, plan).accumulate(turn, 0)
        gradients = [p.grad.flatten().float() for p in host.denoiser.roles.parameters(role) if p.grad is not None]
        found[dtype] = torch.cat(gradients)
    half, whole = found[torch.float16], found[torch.float32]
    assert float(whole.norm()) > 0
    assert float(torch.cosine_similarity(half, whole, 0)) > 0.99
    assert float(half.norm() / whole.norm()) == pytest.approx(1, abs=0.05)


def test_in_other_dtypes_there_is_no_scale(tmp_path: Path) -> None:
    first, _, _ = critic_gradient(tmp_path / "a", torch.float32)
    other, _, _ = critic_gradient(tmp_path / "b", torch.float32, 8.0)
    assert torch.equal(first, other)


def test_an_overflow_drops_the_step(tmp_path: Path) -> None:
    """float16 ends at 65504: the gradient is infinite, nothing moves, and it is counted."""
    gradient, trainer, turn = critic_gradient(tmp_path, torch.float16, 2.0**60)
    before = [p.detach().clone() for p in trainer.host.denoiser.roles.parameters("critic")]
    trainer._apply(turn, 1e-3, {"critic_norm": float(gradient.norm())})
    assert trainer.dropped == 1 and trainer.bad == {"critic": 1}
    after = trainer.host.denoiser.roles.parameters("critic")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_numbers_are_read_once_whatever_they_are() -> None:
    mixed = {"a": 1.5, "b": torch.tensor(2.5), "c": torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)}
    assert read(mixed) == {"a": 1.5, "b": 2.5, "c": 0.5} and read({}) == {}


def test_a_host_that_casts_its_weights_to_float16_is_in_half(tmp_path: Path) -> None:
    """Weights of fp8 or bfloat16 may be multiplied in float16: the host says so."""
    _, trainer, _ = critic_gradient(tmp_path, torch.float32)
    for dtype, half in ((torch.float16, True), (torch.bfloat16, False)):
        trainer.host.computing_dtype = dtype  # type: ignore[attr-defined]
        again = Trainer(trainer.host, trainer.settings, trainer.recipe, trainer.prompts, trainer.plan)
        assert again.in_half == half
