"""Methods that are two: the student's gradient is that of the one and of the other, and each is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_host import SmallHost, setup_of, small
from torch import Tensor

from onestep.training.data.pairs import Pairs
from onestep.training.engine.student import STUDENT, add_student
from onestep.training.methods import METHODS, meanflow, scm
from onestep.training.methods.discriminator import HEAD

BOTH: dict[str, tuple[str, Any]] = {
    "rcm": ("dmd", scm),
    "anyflow": ("dmd", meanflow),
    "sana-sprint": ("ladd", scm),
}
ALONE = {"warm_start": 0, "critic_warm_up": 0, "head_warm_up": 0, "head_blocks": 2}


def built(method: str, folder: Path, prediction: str, **changes: Any) -> tuple[SmallHost, Any, Any]:
    """A host whose student is not the base any more, the run's setup and its plan."""
    host = SmallHost(prediction)
    own = METHODS[method].settings.__dataclass_fields__
    settings = small(method=method, **{name: value for name, value in ALONE.items() if name in own} | changes)
    setup = setup_of(host, settings, folder)
    add_student(host, settings, None)
    with torch.no_grad():
        for _, b in host.denoiser.roles.state(STUDENT).values():
            b.copy_(0.1 * torch.randn(b.shape, generator=torch.Generator().manual_seed(b.numel())))
    plan = METHODS[method].plan(setup)
    with torch.no_grad():
        # a new head tells nothing apart
        for value in host.denoiser.roles.parameters(HEAD) if HEAD in plan.roles else []:
            value.copy_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())))
    return host, setup, plan


def gradient(host: SmallHost, setup: Any, loss: Any) -> list[Tensor]:
    factors = host.denoiser.roles.parameters(STUDENT)
    for factor in factors:
        factor.grad = None
    with host.denoiser.roles.installed():
        loss(setup.prompts.batch(0, range(4)), 1.0, 0)
    return [torch.zeros_like(factor) if factor.grad is None else factor.grad.clone() for factor in factors]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("method", BOTH)
def test_its_gradient_is_the_sum_of_both(method: str, prediction: str, tmp_path: Path) -> None:
    first, second = BOTH[method]
    host, setup, plan = built(method, tmp_path, prediction, anchor=0.5)
    both = gradient(host, setup, plan.phases[-1].turns[-1].loss)
    host, setup, plan = built(method, tmp_path, prediction, anchor=0.5)
    beside, _ = second.beside(setup, Pairs(host, setup.prompts, setup.settings, tmp_path / "pairs"))
    alone = gradient(host, setup, beside)
    host, setup, plan = built(first, tmp_path, prediction, anchor=0.0)
    matched = gradient(host, setup, plan.phases[-1].turns[-1].loss)
    assert any(bool(grad.any()) for grad in alone) and any(bool(grad.any()) for grad in matched)
    for sum_of_both, one, other in zip(both, matched, alone, strict=True):
        torch.testing.assert_close(sum_of_both, one + 0.5 * other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", BOTH)
def test_the_time_to_go_counts_both(method: str, tmp_path: Path) -> None:
    """The consistency's forwards are learning, two for the tangent and two of the guided teacher."""
    costs = [built(method, tmp_path, "flow", anchor=anchor)[2].phases[-1].cost for anchor in (0.0, 1.0)]
    _, setup, _ = built(method, tmp_path, "flow")
    assert costs[1] - costs[0] == pytest.approx(3.5 + 2 + 2)
