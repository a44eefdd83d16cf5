"""Without a graph a layer's output is written in place, from factors cast at once: the same as with one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onestep.core.adapted_layer import AdaptedLayer
from onestep.core.casts import Casts
from onestep.core.roles import TEACHER, Roles
from onestep.core.targets import Target


class Layers(nn.Module):
    """Every kind of layer that is adapted: linear, fused with one part left alone, permuted, convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.fused, self.turned = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 4)
        self.conv, self.point = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(6, 5, 1)
        self.lost = nn.Conv2d(5, 4, 3, padding=1)

    def targets(self) -> list[Target]:
        order = torch.tensor([2, 0, 3, 1])
        return [
            Target("linear", self.linear),
            Target("fused.k", self.fused, slice(4, 8)),
            Target("fused.q", self.fused, slice(0, 4)),
            Target("turned", self.turned, None, order),
            *(Target(name, getattr(self, name)) for name in ("conv", "point", "lost")),
        ]

    def forward(self, x: Tensor) -> Tensor:
        h = self.turned(torch.tanh(self.fused(torch.tanh(self.linear(x)))))
        return self.lost(self.point(torch.tanh(self.conv(h.movedim(-1, 1)))))  # type: ignore[no-any-return]


def made(dtype: torch.dtype = torch.float32) -> tuple[Layers, Roles]:
    torch.manual_seed(0)
    network = Layers().requires_grad_(False)
    roles = Roles(network.targets())
    for number, role in enumerate(("student", "critic")):
        roles.add(role, 3, number)
        for _, b in roles.state(role).values():
            b.copy_(torch.randn(b.shape))
    roles.install()
    return network.to(dtype), roles


CHOSEN: dict[str, Any] = {
    "one role": [("student", 5)],
    "rows of two": [("student", 2), ("critic", 3)],
    "some rows the teacher's": [(TEACHER, 2), ("critic", 1), (TEACHER, 1), ("student", 1)],
}


def answer(network: Layers, roles: Roles, x: Tensor, blocks: Any, grad: bool) -> Tensor:
    with torch.set_grad_enabled(grad), roles.rows(blocks), roles.capture(len(x)):
        return network(x).detach()


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels last"])
@pytest.mark.parametrize("dtype, least", [(torch.float32, 2e-6), (torch.float64, 1e-14), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("blocks", CHOSEN.values(), ids=CHOSEN)
def test_it_answers_as_with_a_graph(blocks: Any, dtype: torch.dtype, least: float, form: torch.memory_format) -> None:
    """Each row by its own role alone too: nothing of another's is written over it."""
    network, roles = made(dtype)
    network.to(memory_format=form)  # type: ignore[call-overload]
    x = torch.randn(5, 8, 8, 6).to(dtype)
    found = answer(network, roles, x, blocks, grad=False)
    torch.testing.assert_close(found, answer(network, roles, x, blocks, grad=True), rtol=least, atol=least)
    at = 0
    for role, rows in blocks:
        part = answer(network, roles, x[at : at + rows], [(role, rows)], grad=True)
        torch.testing.assert_close(found[at : at + rows], part, rtol=least, atol=least)
        at += rows


def test_the_bases_rows_are_the_bases_to_the_bit() -> None:
    network, roles = made()
    x = torch.randn(4, 8, 8, 6)
    roles.remove()
    with torch.no_grad():
        bare = network(x)
    roles.install()
    found = answer(network, roles, x, [(TEACHER, 3), ("critic", 1)], grad=False)
    assert torch.equal(found[:3], bare[:3]) and not torch.equal(found[3:], bare[3:])


def test_rows_that_do_not_add_up_in_a_layer_are_refused() -> None:
    network, roles = made()
    with torch.no_grad(), roles.rows([("student", 1), ("critic", 1)]), roles.capture(2), pytest.raises(ValueError):
        network(torch.randn(3, 8, 8, 6))


def test_forward_mode_and_a_graph_get_new_tensors() -> None:
    network, roles = made()
    layer = AdaptedLayer([roles.targets["linear"]])
    x, out = torch.randn(2, 6), torch.randn(2, 8)
    assert not layer.may_be_written(x, out)
    with torch.no_grad():
        assert layer.may_be_written(x, out) and not layer.may_be_written(x.double(), out)
        with torch.autograd.forward_ad.dual_level():
            assert not layer.may_be_written(x, out)


def in_bfloat16(roles: Roles, casts: Casts, role: str) -> dict[str, tuple[Tensor, Tensor]]:
    return casts.of(roles._factors[role], torch.bfloat16, torch.device("cpu"))


def test_the_cast_factors_follow_their_masters() -> None:
    """Whoever writes to them: an optimiser, a copy, a mean, a state that is restored."""
    network, roles = made()
    casts, x = Casts(roles.targets), torch.randn(2, 8, 8, 6)
    table = in_bfloat16(roles, casts, "student")
    plain = casts.of(roles._factors["student"], torch.float32, torch.device("cpu"))
    assert len({value.untyped_storage().data_ptr() for pair in table.values() for value in pair}) == 2, "one buffer"
    assert plain["linear"][0].data_ptr() == roles._factors["student"]["linear"][0].data_ptr(), "no copy"
    masters = roles._factors["student"]["linear"]
    assert torch.equal(table["linear"][0], masters[0].detach().bfloat16().t())

    def written() -> Any:
        optimizer = torch.optim.AdamW(roles.parameters("student"), lr=0.1)
        for value in roles.parameters("student"):
            value.grad = torch.ones_like(value)
        yield optimizer.step
        yield lambda: roles.copy("critic", "student")
        yield lambda: roles.lerp("student", "critic", 0.5)
        yield lambda: roles.state("student")["linear"][0].zero_()
        # behind autograd's back, as some optimisers' kernels write
        yield lambda: roles._factors["student"]["linear"][0].data.add_(1)
        yield lambda: roles.load("student", {n: (a * 2, b) for n, (a, b) in roles.state("critic").items()})

    for write in written():
        write()
        pair = roles._factors["student"]["linear"]
        assert torch.equal(in_bfloat16(roles, casts, "student")["linear"][0], pair[0].detach().bfloat16().t())
        answer(network, roles, x, [("student", 2)], grad=False)
