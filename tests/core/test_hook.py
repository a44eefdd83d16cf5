"""What a call finds once at its first layer is never stale: casts, who serves, and what surrounds the call."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onestep.core.checkpoint import checkpoint_blocks
from onestep.core.roles import Roles
from onestep.core.targets import Target

BF16 = torch.bfloat16


class Net(nn.Module):
    """A block of two linear layers and a convolution, and a head that computes in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"first": nn.Linear(6, 8), "second": nn.Linear(8, 6)})
        self.conv, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 3)
        self.inner = _Block(self.block)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        h = self.conv(h.movedim(-1, 1)).movedim(1, -1)
        return self.head(h.to(self.head.weight.dtype))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers["second"](torch.tanh(self.layers["first"](x)))  # type: ignore[no-any-return]


def made(dtype: torch.dtype, head: torch.dtype | None = None) -> tuple[Net, Roles]:
    torch.manual_seed(3)
    net = Net().requires_grad_(False).to(dtype)
    net.head.to(head or dtype)
    modules = {"first": net.block["first"], "second": net.block["second"], "conv": net.conv, "head": net.head}
    roles = Roles([Target(name, module) for name, module in modules.items()])
    for number, role in enumerate(("student", "critic")):
        roles.add(role, 2, number)
        for _, b in roles.state(role).values():
            b.copy_(torch.randn(b.shape) * 0.3)
    roles.install()
    return net, roles


def inputs(dtype: torch.dtype, rows: int = 2) -> Tensor:
    return torch.randn(rows, 4, 4, 6, generator=torch.Generator().manual_seed(rows)).to(dtype)


def answer(net: Net, roles: Roles, x: Tensor, grad: bool, blocks: Any = (("student", None),)) -> Tensor:
    rows = [(role, len(x) if count is None else count) for role, count in blocks]
    chosen = roles.use(rows[0][0]) if len(rows) == 1 else roles.rows(rows)
    with torch.set_grad_enabled(grad), chosen, roles.capture(len(x)):
        return net(x)


def merged(net: Net, roles: Roles, x: Tensor, role: str = "student") -> Tensor:
    """The network without hooks, its weights W + B A of the masters as they are now, in float64."""
    roles.remove()
    plain = copy.deepcopy(net).double()
    roles.install()
    layers = {"first": plain.block["first"], "second": plain.block["second"], "conv": plain.conv, "head": plain.head}
    for name, (a, b) in roles.state(role).items():
        weight = layers[name].weight
        weight.data += (b.double().flatten(1) @ a.double().flatten(1)).view(weight.shape)
    return plain(x.double()).detach()


def close(found: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    least = {torch.float32: 1e-5, torch.float64: 1e-12, BF16: 0.06}[dtype]
    torch.testing.assert_close(found.double(), right, rtol=least, atol=least)


Write = Callable[[Roles], Any]


def optimiser_step(roles: Roles, **how: Any) -> None:
    optimizer = torch.optim.AdamW(roles.parameters("student"), lr=0.3, **how)
    for value in roles.parameters("student"):
        value.grad = torch.ones_like(value)
    optimizer.step()
    optimizer.zero_grad()


def resumed(roles: Roles) -> None:
    """As a run does that finds its state: new tensors for an old name."""
    state = {name: (a * -1, b * 2) for name, (a, b) in roles.state("student").items()}
    roles.load("student", state)


def added_in_inference(roles: Roles) -> None:
    with torch.inference_mode():
        roles.lerp("student", "critic", 0.7)


WRITES: dict[str, Write] = {
    "optimiser": optimiser_step,
    "fused optimiser": lambda roles: optimiser_step(roles, fused=True),
    "one tensor after the other": lambda roles: optimiser_step(roles, foreach=False),
    "resume": resumed,
    "copy": lambda roles: roles.copy("critic", "student"),
    "mean": lambda roles: roles.lerp("student", "critic", 0.7),
    "mean under inference mode": added_in_inference,
    "behind autograd": lambda roles: [value.data.mul_(2) for value in roles.parameters("student")],
    "state": lambda roles: [b.zero_() for _, b in roles.state("student").values()],
    "drop and add": lambda roles: (roles.drop("student"), roles.add("student", 3, 9), roles.copy("critic", "student")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_call_sees_what_was_written_before_it(write: Write, dtype: torch.dtype) -> None:
    net, roles = made(dtype)
    x = inputs(dtype)
    before = merged(net, roles, x)
    for grad in (True, False):
        close(answer(net, roles, x, grad).detach(), before, dtype)
    write(roles)
    right = merged(net, roles, x)
    assert (right - before).abs().max() > 0.2, "written to"
    for grad in (False, True):
        close(answer(net, roles, x, grad).detach(), right, dtype)
    with torch.inference_mode():
        close(answer(net, roles, x, False), right, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_first_call_under_inference_mode_spoils_none_that_learns(dtype: torch.dtype) -> None:
    net, roles = made(dtype)
    other_net, other = made(dtype)
    x = inputs(dtype)
    with torch.inference_mode():
        answer(net, roles, x, False)
    for which, its in ((net, roles), (other_net, other)):
        answer(which, its, x, True).float().square().sum().backward()
    for mine, right in zip(roles.parameters("student"), other.parameters("student"), strict=True):
        assert torch.equal(mine.grad, right.grad) and mine.grad.abs().max() > 0


def test_a_graph_is_told_when_its_masters_are_written_to() -> None:
    """Its gradients would be of two networks; autograd says so, as of any weight."""
    for dtype in (torch.float32, BF16):
        net, roles = made(dtype)
        out = answer(net, roles, inputs(dtype), True)
        optimiser_step(roles)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.float().sum().backward()


@pytest.mark.parametrize("dtype, head", [(BF16, torch.float32), (torch.float32, BF16), (BF16, torch.float64)])
def test_layers_of_several_dtypes_each_have_their_own(dtype: torch.dtype, head: torch.dtype) -> None:
    net, roles = made(dtype, head)
    x = inputs(dtype)
    for grad in (False, True):
        close(answer(net, roles, x, grad).detach(), merged(net, roles, x), BF16)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_gradients_are_those_of_casts_at_each_layer(dtype: torch.dtype, checkpointing: bool) -> None:
    """Against the same network whose factors are cast where they are used, by autograd alone."""
    net, roles = made(dtype)
    x, cotangent = inputs(dtype).requires_grad_(True), torch.randn(2, 4, 4, 3, dtype=dtype)
    if checkpointing:
        with checkpoint_blocks([net.inner], roles):
            answer(net, roles, x, True).backward(cotangent)
    else:
        answer(net, roles, x, True).backward(cotangent)
    found = {name: tuple(value.grad for value in pair) for name, pair in roles._factors["student"].items()}
    mine, x.grad = x.grad, None
    for _, pair in roles._factors["student"].items():
        for value in pair:
            value.grad = None
    roles.remove()
    list(_by_autograd(net, roles))
    net(x).backward(cotangent)
    least = {torch.float32: 2e-6, BF16: 0.03}[dtype]
    torch.testing.assert_close(mine, x.grad, rtol=least, atol=least * float(x.grad.abs().max()))
    for name, pair in roles._factors["student"].items():
        for value, grad in zip(pair, found[name], strict=True):
            assert grad.dtype == torch.float32
            torch.testing.assert_close(grad, value.grad, rtol=least, atol=least * float(value.grad.abs().max()))


def _by_autograd(net: Net, roles: Roles) -> Iterator[Any]:
    """Hooks that add B A x by plain operations, each factor cast where it is used."""
    for name, (a, b) in roles._factors["student"].items():
        module = roles.targets[name].module
        if name == "conv":
            yield module.register_forward_hook(
                lambda m, i, o, a=a, b=b: (
                    o + nn.functional.conv2d(nn.functional.conv2d(i[0], a.to(i[0].dtype), None, 1, 1), b.to(i[0].dtype))
                )
            )
        else:
            yield module.register_forward_hook(
                lambda m, i, o, a=a, b=b: o + i[0] @ a.to(i[0].dtype).t() @ b.to(i[0].dtype).t()
            )


def test_threads_have_their_own_roles_and_casts() -> None:
    """One trains and steps while others draw by two roles that nobody writes to."""
    net, roles = made(BF16)
    roles.add("mean", 2, 5)
    roles.copy("critic", "mean")
    x = inputs(BF16)
    right = {role: answer(net, roles, x, False, [(role, None)]) for role in ("critic", "mean")}
    wrong: list[str] = []
    done = threading.Event()

    def draw(role: str) -> None:
        while not done.is_set():
            if not torch.equal(answer(net, roles, x, False, [(role, None)]), right[role]):
                wrong.append(role)

    threads = [threading.Thread(target=draw, args=(role,)) for role in right]
    for thread in threads:
        thread.start()
    for _ in range(30):
        answer(net, roles, x, True).float().sum().backward()
        optimiser_step(roles)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_role_of_rows_that_are_not_the_batch_is_served() -> None:
    """A layer over windows has more rows than the batch: one role serves them all; rows of several are refused."""
    net, roles = made(torch.float32)
    x = inputs(torch.float32)
    with torch.no_grad(), roles.use("student"), roles.capture(1):
        close(net(x), merged(net, roles, x), torch.float32)
    with torch.no_grad(), roles.rows([("student", 1), ("critic", 2)]), roles.capture(3), pytest.raises(ValueError):
        net(x)


def test_autocast_forward_mode_and_a_leaf_output_go_the_plain_way() -> None:
    net, roles = made(torch.float32)
    x = inputs(torch.float32)
    right = merged(net, roles, x)
    with torch.autocast("cpu", BF16):
        for grad in (True, False):
            close(answer(net, roles, x, grad).detach(), right, BF16)

    def function(value: Tensor) -> Tensor:
        return answer(net, roles, value, True)

    tangent = torch.randn_like(x)
    _, found = torch.func.jvp(function, (x,), (tangent,))
    step = 1e-3
    slope = (merged(net, roles, x + step * tangent) - merged(net, roles, x - step * tangent)) / (2 * step)
    torch.testing.assert_close(found.detach().double(), slope, rtol=1e-3, atol=1e-3)
