"""The mode that counts: FLOPs as torch counts them, bytes of storages, and a card that fills up at a chosen byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_host import SmallHost, setup_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from onestep.training.engine.student import STUDENT, add_student
from onestep.training.engine.trainer import Trainer
from onestep.training.engine.turns import Numbers, Phase, Plan, Turn
from onestep.training.methods import settings_for
from onestep.training.plan.meter import Meter
from onestep.training.plan.trace import Count, Scale


class Net(nn.Module):
    """A convolution, an attention by matrix products and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 12, 3, padding=1, stride=2), nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x).flatten(2).transpose(1, 2)
        h = torch.softmax(h @ h.transpose(1, 2) / 3, -1) @ h
        return self.linear(torch.nn.functional.gelu(h))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_flops_are_those_that_torch_counts(device: str) -> None:
    """Forward and backward; twice, as what is known of an operation is used again."""
    net, x = Net().to(device), torch.ones(5, 3, 16, 12, device=device)
    with FlopCounterMode(display=False) as torchs:
        for _ in range(2):
            net(x).sum().backward()
    meter = Meter("meta")
    hollow = Net().to("meta")
    with meter, meter.part("all"):
        for _ in range(2):
            hollow(torch.empty(5, 3, 16, 12, device="meta")).sum().backward()
    count = Count.of(meter.trace, 7, 11)
    assert count.flops("all", 7, 11) == torchs.get_total_flops() > 10**5


def test_bytes_are_those_of_storages() -> None:
    """A view takes none, a sum in place takes none, and what is forgotten is free."""
    meter = Meter()
    with meter:
        a = torch.empty(100, 10, device="meta")
        assert meter.live == 4000
        b = a.t()[:5].reshape(-1)  # copied: it is no view
        assert meter.live == 4000 + 5 * 100 * 4
        a.add_(1)
        c = a.view(-1)
        assert meter.live == 6000
        del a, b
        assert meter.live == 4000
        del c
        assert (meter.live, meter.most) == (0, 6000)
    assert (torch.ones(3) + 1).sum() == 6  # nothing is left of it


def test_what_is_asked_of_meta_is_answered_and_noted() -> None:
    meter = Meter()
    with meter:
        x = torch.empty(4, 2, device="meta")
        assert float(x.sum()) == 1 and bool((x > 0).all())
        assert torch.equal(x.cpu(), torch.ones(4, 2))
        assert (torch.ones(4, 2).to("meta") + x).is_meta
    assert meter.crossings["read"] == 2 and meter.crossings["to the host"] == 1


@pytest.mark.parametrize(
    ("number", "at_batch_3_and_rank_64"), [(0, 0), (1, 1), (12, 12), (7 * 12, 3 * 12), (11 * 12, 64 * 12), (77, 3 * 64)]
)
def test_numbers_scale_by_what_divides_them(number: int, at_batch_3_and_rank_64: int) -> None:
    """Counted at batch 7 and rank 11."""
    scale = Scale(7, 11, 3, 64)
    assert scale(number) == at_batch_3_and_rank_64
    assert scale.array(np.array([number, -number])).tolist() == [at_batch_3_and_rank_64, -at_batch_3_and_rank_64]
    assert Scale(7, 11, 7, 11)(number) == number


def test_a_card_that_fills_up_raises_as_torch_does() -> None:
    """At the byte that is too much, and not at the one before; what was asked for in vain is not held."""
    for cap, fits in ((3999, False), (4000, True)):
        meter = Meter("cpu", cap=cap)
        with meter:
            if fits:
                assert torch.empty(1000).numel() == 1000
                continue
            with pytest.raises(torch.OutOfMemoryError, match="3999"):
                torch.empty(1000)
            assert meter.live == 0


def test_the_trainer_halves_its_micro_batches_on_a_card_that_fills_up(tmp_path: Path) -> None:
    """A run that went down learns the same gradients as one that began there."""
    found = []
    for accumulation, room in ((1, 0.7), (2, 9.0)):
        host = SmallHost(seed=3)
        settings = settings_for(method="regression", batch=8, accumulation=accumulation, rank=2, sizes="64x64", steps=2)
        setup = setup_of(host, settings, tmp_path / str(accumulation))
        add_student(host, settings, None)

        def loss(batch: object, share: float, update: int, host: SmallHost = host) -> Numbers:
            with host.denoiser.roles.use(STUDENT):
                x0 = host.denoiser(batch.normal("x"), torch.full((len(batch),), 0.9, dtype=torch.float64), batch.cond)
            (share * x0.square().sum() / len(batch)).backward()
            return {"loss": float(x0.detach().square().mean())}

        turn = Turn(STUDENT, loss, 1e-4)
        trainer = Trainer(host, settings, setup.recipe, setup.prompts, Plan([STUDENT], [Phase("all", 2, [turn])]))
        with host.denoiser.roles.installed():
            with Meter("cpu") as free:
                trainer.accumulate(turn, 0)
            for factor in host.denoiser.roles.parameters(STUDENT):
                factor.grad = None
            trainer.accumulation = accumulation
            with Meter("cpu", cap=room * free.most):
                trainer.accumulate(turn, 0)
        found.append((trainer.accumulation, [factor.grad for factor in host.denoiser.roles.parameters(STUDENT)]))
    (halved, ours), (began, theirs) = found
    assert halved == began == 2
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
