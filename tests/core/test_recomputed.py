"""Which modules of which blocks each grade computes again, and that what is kept grows from grade to grade."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import small_networks as small
import torch
from torch import Tensor, nn

from onestep.core.checkpoint import Checkpoints, checkpoint_blocks
from onestep.core.families import blocks_of
from onestep.core.recomputed import BLOCKS, FEED_FORWARDS, GRADES, NOTHING, heavier, recomputed
from onestep.core.roles import Roles

FORWARDS = {"sd15": 1, "sdxl": 1, "sd3": 2, "flux": 2}
"""Feed-forwards of a transformer block, of the picture and of the text."""


@pytest.mark.parametrize("name", FORWARDS)
def test_each_transformer_blocks_feed_forwards_and_flux_single_blocks_whole(name: str) -> None:
    blocks = blocks_of(small.network_of(name, torch.float32))
    found = recomputed(blocks, FEED_FORWARDS)
    kinds = Counter(type(module).__name__ for module in found)
    single = [block for block in blocks if type(block).__name__ == "FluxSingleTransformerBlock"]
    double = [block for block in blocks if hasattr(block, "ff")]
    silent = sum(getattr(block, "ff_context", "none") is None for block in double)  # the last of SD3's
    assert kinds["FluxSingleTransformerBlock"] == len(single)
    assert kinds["FeedForward"] == FORWARDS[name] * len(double) - silent
    assert len(kinds) == 1 + bool(single) and len(found) == len(set(found)) > 0
    assert recomputed(blocks, BLOCKS) == blocks and recomputed(blocks, NOTHING) == []


def test_grades_end() -> None:
    assert [heavier(grade) for grade in GRADES] == [FEED_FORWARDS, BLOCKS, None]


class BasicTransformerBlock(nn.Module):
    """By name; counts the forwards of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.ff = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6))
        self.forwards: Counter[str] = Counter()
        for name in ("attention", "ff"):
            part = getattr(self, name)
            part.forward = self.counted(name, part.forward)

    def counted(self, name: str, forward: Any) -> Any:
        def run(x: Tensor) -> Tensor:
            self.forwards[name] += 1
            return forward(x)  # type: ignore[no-any-return]

        return run

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.attention(x))
        return x + self.ff(x)


def kept(grade: str) -> tuple[int, Counter[str], Tensor]:
    """Numbers that autograd keeps between forward and backward, forwards of the parts, and the gradient."""
    torch.manual_seed(0)
    block = BasicTransformerBlock().requires_grad_(False).eval()
    x = torch.randn(3, 6, requires_grad=True)
    numbers: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        numbers[value.untyped_storage().data_ptr()] = value.numel()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        checkpoints = Checkpoints([block], Roles([]), grade)
        out = block(x * 1.0)
    out.square().sum().backward()
    checkpoints.remove()
    assert x.grad is not None
    return sum(numbers.values()), block.forwards, x.grad


def test_from_grade_to_grade_less_is_kept_and_more_computed_again() -> None:
    found = {grade: kept(grade) for grade in GRADES}
    most, some, least = (found[grade][0] for grade in GRADES)
    assert most > some > least
    assert found[NOTHING][1] == {"attention": 1, "ff": 1}
    assert found[FEED_FORWARDS][1] == {"attention": 1, "ff": 2}
    assert found[BLOCKS][1] == {"attention": 2, "ff": 2}
    assert all(torch.equal(found[grade][2], found[NOTHING][2]) for grade in GRADES)


def test_a_grade_is_left_for_another_and_nothing_stays_behind() -> None:
    """A graph of before the change is run backward as it was made."""
    block = BasicTransformerBlock().requires_grad_(False).eval()
    x = torch.randn(3, 6)

    def gradient(change: str | None = None) -> Tensor:
        leaf = x.clone().requires_grad_()
        out = block(leaf)
        if change is not None:
            checkpoints.use(change)
        out.square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    wanted = gradient()
    checkpoints = Checkpoints([block], Roles([]), NOTHING)
    for grade in (FEED_FORWARDS, BLOCKS, NOTHING, BLOCKS, BLOCKS):
        assert torch.equal(gradient(grade), wanted) and checkpoints.grade == grade
        assert torch.equal(gradient(), wanted)
    checkpoints.remove()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in block.modules()]
    assert not any(hooks) and torch.equal(gradient(), wanted)


def test_a_change_after_a_forward_that_broke_off_leaves_no_hook_on_saved_tensors() -> None:
    """As after running out of memory within a block."""
    block = BasicTransformerBlock().requires_grad_(False).eval()
    checkpoints = Checkpoints([block], Roles([]), FEED_FORWARDS)
    handle = block.ff[1].register_forward_pre_hook(lambda *given: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(torch.OutOfMemoryError):
        block(torch.randn(3, 6, requires_grad=True))
    handle.remove()
    checkpoints.use(BLOCKS)
    saved = torch.ones(1, requires_grad=True).sin().grad_fn._saved_self  # type: ignore[union-attr]
    assert isinstance(saved, Tensor)
    with checkpoint_blocks([block.ff], Roles([])):  # and beside others of the same kind
        leaf = torch.randn(3, 6, requires_grad=True)
        block(leaf).sum().backward()
        assert leaf.grad is not None
    checkpoints.remove()
