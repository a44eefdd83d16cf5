"""The ring: what is copied and when, to the byte; passes that fail, stop half-way or go another way; wrong rings."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from delayed_link import DelayedLink, FailingLink
from mutations import must_fail, mutant
from narrowed import narrowed
from streamed_chain import CPU, Streamed, equal, sizes_of
from torch import Tensor, nn

import onestep.core.streaming as streaming
from onestep.core.errors import OneStepError
from onestep.core.memory import attempt
from onestep.core.streaming import footprint, streamed

ROWS = [("teacher", 1), ("student", 2), ("critic", 1)]


def resident(count: int) -> list[Tensor]:
    with Streamed(count) as plain:
        return [plain.answer(), plain.answer(ROWS), *plain.gradients(), *plain.gradients(ROWS)]


def whole(made: Streamed) -> list[Tensor]:
    return [made.answer(), made.answer(ROWS), *made.gradients(), *made.gradients(ROWS)]


@pytest.mark.parametrize("count", [4, 5, 7, 8])
def test_each_block_is_copied_once_a_forward_and_once_more_in_backward(count: int) -> None:
    """Those that lie in the ring still where the way turns are not: two of them."""
    with Streamed(count, DelayedLink()) as made:
        sizes = sizes_of(made.blocks)
        middle, first, last = sum(sizes[2:-2]), sum(sizes[:2]), sum(sizes[-2:])
        for _ in range(3):
            assert made.moved(made.answer) == (count, first + middle + last)
        for rows in ("student", ROWS):
            # of rows of several roles as of one
            with_gradient = made.moved(lambda rows=rows: made.gradients(rows))
            came_from_an_end = count if rows == "student" else count - 2
            forward = first + middle + last if rows == "student" else middle + last
            assert with_gradient == (came_from_an_end + count - 2, forward + first + middle)
        assert made.moved(made.answer) == (count - 2, middle + last)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_fits_into_the_ring_is_copied_once(count: int) -> None:
    """Of three blocks the first and the last share a slot, and the middle one stays."""
    with Streamed(count, DelayedLink()) as made:
        sizes = sizes_of(made.blocks)
        assert made.moved(made.answer) == (count, sum(sizes))
        again = 2 if count == 3 else 0
        assert made.moved(made.answer) == (again, sizes[0] + sizes[-1] if again else 0)
        assert equal(whole(made), resident(count))


def test_the_next_copy_begins_before_the_block_computes() -> None:
    """From the second pass on, when the order is known: two copies have begun where one is waited for."""
    link = DelayedLink()
    with Streamed(6, link) as made:
        seen: list[int] = []
        for block in made.blocks:
            block.up.register_forward_pre_hook(lambda *unused: seen.append(len(link.begun) - len(link.waited)))
        made.answer()
        assert seen == [0] * 6
        seen.clear()
        made.answer()
        assert seen == [1] * 5 + [0]
        made.gradients()
        seen.clear()
        made.gradients()
        # forward again; then backward, whose first two blocks are there
        assert seen == [0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("count", [5, 6])
def test_a_pass_that_stops_half_way_leaves_the_ring_right(count: int) -> None:
    wanted = resident(count)
    with Streamed(count, DelayedLink()) as made:
        sizes = sizes_of(made.blocks)
        made.answer()
        for until in range(1, count):
            made.network.until = until
            with pytest.raises(InterruptedError):
                made.answer()
            with pytest.raises(InterruptedError):
                made.gradients()
            made.network.until = count
            assert equal(whole(made), wanted)
        made.answer()
        made.network.until = 2
        # two blocks, and the third, which was to be next
        with pytest.raises(InterruptedError):
            made.moved(made.answer)
        assert made.stream._link.begun[-3:] == sizes[:3]


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [0, 2, 4, 1, 3], [1, 1, 3], [0, 1, 2, 3, 4, 3, 0]])
def test_another_order_is_right_too_and_is_learnt(order: list[int]) -> None:
    def passes(made: Streamed) -> list[Tensor]:
        found = [made.answer(), *made.gradients()]
        usual, made.network.order = made.network.order, order
        made.network.until = len(order)
        for _ in range(3):
            factors = made.roles.parameters("student")
            x = made.x.clone().requires_grad_()
            with made.roles.use("student"):
                captured = made.roles.capture(len(x))
            with captured:
                loss = made.network(x).square().sum()
            used = torch.autograd.grad(loss, [x, *factors], allow_unused=True)
            found += [made.answer(), *(torch.zeros(1) if value is None else value for value in used)]
        made.network.order, made.network.until = usual, len(usual)
        return [*found, *made.gradients(ROWS)]

    with Streamed(5) as plain:
        wanted = passes(plain)
    with Streamed(5, DelayedLink()) as made:
        assert equal(passes(made), wanted)
        made.answer()
        assert made.moved(made.answer)[0] == 5


@pytest.mark.parametrize("at", narrowed(range(1, 19), 1, 4, 9, 13, 16, 17, 18))
def test_out_of_memory_in_a_copy_leaves_the_ring_right(at: int) -> None:
    """In whichever copy of a forward or a backward: the same work, tried again, is as if nothing had been."""
    wanted = resident(5)
    with Streamed(5, FailingLink(at)) as made:
        failures = 0
        for work in (made.answer, made.gradients, lambda: made.answer(ROWS), lambda: made.gradients(ROWS)):
            found, why = attempt(work)
            failures += found is None
            assert why in ("", "injected")
        assert failures == (1 if made._link.at == 0 else 0)
        assert equal(whole(made), wanted)
    assert failures == 1 or at > 16


@pytest.mark.parametrize("at", narrowed(range(1, 12), 1, 4, 8, 11))
def test_an_error_within_a_block_leaves_the_ring_right(at: int) -> None:
    wanted = resident(5)
    with Streamed(5, DelayedLink()) as made:
        calls: list[int] = []

        def fail(*unused: object) -> None:
            calls.append(1)
            if len(calls) == at:
                raise torch.OutOfMemoryError("injected")

        handles = [block.down.register_forward_pre_hook(fail) for block in made.blocks]
        assert (attempt(made.gradients)[0] is None) == (at <= 10)
        for handle in handles:
            handle.remove()
        assert equal(whole(made), wanted)


def test_footprint_is_what_lies_on_the_device() -> None:
    with Streamed(5, DelayedLink()) as made:
        told = footprint(made.network, made.blocks)
        outside = 4 * sum(p.numel() for part in (made.network.first, made.network.last) for p in part.parameters())
        sizes = sizes_of(made.blocks)
        assert (told.resident, told.ring, told.streamed) == (outside, 2 * max(sizes), sum(sizes))
        assert sum(slot.untyped_storage().nbytes() for slot in made.stream._ring) == told.ring
        assert made.moved(made.answer)[1] == told.streamed
    assert made._link.closed


def test_a_network_without_frozen_blocks_is_refused() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(OneStepError, match="no blocks of frozen weights"), streamed(network, [network[0]], CPU):
        pass


# -- wrong rings ------------------------------------------------------------------------------------------------------


def computes(module: ModuleType) -> None:
    with Streamed(5, DelayedLink(), module) as made:
        assert equal(whole(made), resident(5))
        assert equal(whole(made), resident(5))


def recovers(module: ModuleType) -> None:
    for at in (3, 8, 12):
        with Streamed(5, FailingLink(at), module) as made:
            for work in (made.answer, made.gradients, made.gradients):
                attempt(work)
            assert equal(whole(made), resident(5))


def reads(module: ModuleType) -> None:
    with Streamed(5, DelayedLink(), module) as made:
        before = {name: value.clone() for name, value in made.network.state_dict().items()}
        made.answer()
        made.answer()
        assert all(torch.equal(before[name], value) for name, value in made.network.state_dict().items())


def crosses(module: ModuleType) -> None:
    """Blocks of one slot after another."""
    with Streamed(5) as plain:
        plain.network.order = [0, 2, 4, 1, 3]
        wanted = [plain.answer(), *plain.gradients()] * 2
    with Streamed(5, DelayedLink(), module) as made:
        made.answer()
        made.network.order = [0, 2, 4, 1, 3]
        assert equal([made.answer(), *made.gradients()] + [made.answer(), *made.gradients()], wanted)


def overlaps(module: ModuleType) -> None:
    """Where a block computes, the next one's copy has begun."""
    link = DelayedLink()
    with Streamed(5, link, module) as made:
        made.answer()
        seen: list[int] = []
        for block in made.blocks:
            block.up.register_forward_pre_hook(lambda *unused: seen.append(len(link.begun) - len(link.waited)))
        made.answer()
        assert seen == [1] * 4 + [0]


WRONG = {
    "no wait": ("self._link.wait(self._tickets[slot])", "None", computes),
    "not shown": ("self._packed[block].show()", "None", computes),
    "the other slot": ("copy(self._ring[slot][", "copy(self._ring[1 - slot][", computes),
    "not told of backward": ("self._need(BACKWARD, block)", "None", computes),
    "an early overwrite": ("other != slot and self._holds[other] is not following", "True", crosses),
    "the next in the slot of this": (
        "other = self._slot_of(following)\n            if other != slot and self._holds[other] is not following:",
        "other = slot\n            if self._holds[other] is not following:",
        computes,
    ),
    "one slot for all": ("len(self._slot) % SLOTS", "0", overlaps),
    "no copy ahead": ("following is not None", "False", overlaps),
    "held though it failed": (
        "before, self._holds[slot], self._tickets[slot] = self._holds[slot], None, None",
        "before = self._holds[slot]; self._holds[slot] = block; self._tickets[slot] = None",
        recovers,
    ),
    "not hidden": ("self._packed[before].hide()", "None", reads),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_ring_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, check = WRONG[name]
    check(streaming)
    must_fail(check, mutant("onestep.core.streaming", old, new, monkeypatch))
