"""What the comparison with peers rests on, without their code: the network that they are given is ours to the last
factor, and a difference is told as it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "peers"))

import difference  # noqa: E402
import world  # noqa: E402

from onestep.training.engine.student import STUDENT  # noqa: E402


@pytest.mark.broad
@pytest.mark.parametrize("name", ["tiny", "tiny-flow"])
def test_the_peers_network_is_ours_with_pefts_adapters(name: str) -> None:
    """Its answer, and the gradient of each factor."""
    made = world.World(name)
    x, time, cond = made.noise, torch.tensor([900.0, 500.0, 100.0, 3.0], dtype=torch.float64), made.batch.cond
    network = made.network(STUDENT)

    def ours() -> Tensor:
        with made.denoise.roles.use(STUDENT), made.denoise.roles.capture(len(x), time, cond):
            loss = made.denoise.network(x, time, cond).square().sum()
            loss.backward()
        return loss.detach()

    found = made.ours(ours)
    theirs = made.theirs(network, lambda: world.answered(network, x, time, cond).square().sum())
    told = difference.row("peft", "the square", name, "the same", found, theirs)
    assert told.agrees and float(found.flat.norm()) > 0


def test_a_difference_is_told_as_it_is() -> None:
    """A factor is told as one; a gradient that points elsewhere is not."""
    a, b = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 5.0]])
    theirs = world.Outcome(2.0, {"x/a": a, "x/b": b})
    alike = difference.row("", "", "", "", theirs, theirs)
    assert alike.agrees and (alike.loss, alike.factor, alike.apart, alike.turned) == (1, 1, 0, 0)
    double = world.Outcome(4.0, {"x/b": 2 * b, "x/a": 2 * a})
    told = difference.row("", "", "", "", double, theirs)
    assert not told.agrees and (told.loss, told.factor, told.apart, told.turned) == (2, 2, 1, 0)
    assert difference.row("", "", "", "", double, theirs, scale=0.5).agrees
    other = difference.row("", "", "", "", world.Outcome(2.0, {"x/a": a, "x/b": -b}), theirs)
    # |(3, 4, 5)|^2 = 50, of which 25 is turned round
    assert other.factor == 0 and other.apart == pytest.approx(2**0.5) and not other.agrees


def test_noise_is_drawn_alike() -> None:
    like = torch.empty(2, 3, dtype=torch.float64)
    with world.same_draws(like) as noise:
        torch.testing.assert_close(torch.randn_like(like), noise, rtol=0, atol=0)
