"""Blocks compiled with their adapters: whole, with the eager numbers, and one graph for each role map."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onestep.core.checkpoint import checkpoint_blocks
from onestep.core.compiled import compiled_blocks
from onestep.core.roles import TEACHER, Roles
from onestep.core.targets import Target, is_adaptable

ROWS = 3


def transformer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from diffusers.models.attention import BasicTransformerBlock

    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=12)
    return block, (torch.randn(ROWS, 5, 16), None, torch.randn(ROWS, 4, 12))


def resnet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from diffusers.models.resnet import ResnetBlock2D

    block = ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=12, groups=4)
    return block, (torch.randn(ROWS, 8, 6, 6), torch.randn(ROWS, 12))


def sd3() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from diffusers.models.attention import JointTransformerBlock

    block = JointTransformerBlock(16, 2, 8, qk_norm="rms_norm")
    return block, (torch.randn(ROWS, 6, 16), torch.randn(ROWS, 4, 16), torch.randn(ROWS, 16))


def flux() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

    return FluxTransformerBlock(16, 2, 8), _flux_inputs()


def flux_single() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    return FluxSingleTransformerBlock(16, 2, 8), _flux_inputs()


def _flux_inputs() -> tuple[Any, ...]:
    angles = torch.randn(10, 8)
    return torch.randn(ROWS, 6, 16), torch.randn(ROWS, 4, 16), torch.randn(ROWS, 16), (angles.cos(), angles.sin())


KINDS = {"transformer": transformer, "resnet": resnet, "sd3": sd3, "flux": flux, "flux single": flux_single}
MAPS: dict[str, Any] = {
    "teacher": [(TEACHER, ROWS)],
    "student": [("student", ROWS)],
    "mixed": [(TEACHER, 1), ("critic", 2)],
}


class Network(nn.Module):
    """A block of a kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.inputs = KINDS[kind]()

    def forward(self, x: Tensor) -> Tensor:
        found = self.block(x, *self.inputs[1:])
        given = [value for value in (found if isinstance(found, tuple) else (found,)) if value is not None]
        return torch.stack([value.flatten(1).square().sum(1) for value in given]).sum(0)


def made(kind: str) -> tuple[Network, Roles]:
    network = Network(kind).eval().requires_grad_(False).double()
    network.inputs = tuple(_double(value) for value in network.inputs)
    roles = Roles([Target(name, module) for name, module in network.named_modules() if is_adaptable(module)])
    for number, role in enumerate(("student", "critic")):
        roles.add(role, 2, number)
    written(roles, 0.1)
    roles.install()
    return network, roles


def _double(value: Any) -> Any:
    return tuple(map(_double, value)) if isinstance(value, tuple) else value.double() if value is not None else None


def written(roles: Roles, scale: float) -> None:
    for role in ("student", "critic"):
        for number, (_, b) in enumerate(roles.state(role).values()):
            b.copy_(scale * torch.randn(b.shape, generator=torch.Generator().manual_seed(number)))


def turn(network: Network, roles: Roles, name: str, grad: bool) -> list[Tensor]:
    """The answer, the gradient of its input, and of every factor that served."""
    x = network.inputs[0].clone().requires_grad_(grad)
    factors = roles.parameters("student") + roles.parameters("critic")
    for factor in factors:
        factor.grad = None
    with torch.set_grad_enabled(grad), roles.rows(MAPS[name]), roles.capture(ROWS):
        out = network(x)
    if not grad:
        return [out]
    out.square().sum().backward()
    return [out.detach(), *(value.grad for value in (x, *factors) if value.grad is not None)]


class Counter:
    """A back end that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


BROAD = pytest.mark.broad  # compiling takes its time


@pytest.mark.parametrize(
    "kind, checkpointing",
    [
        ("resnet", True),
        pytest.param("transformer", False, marks=BROAD),
        *(pytest.param(kind, True, marks=BROAD) for kind in KINDS if kind != "resnet"),
    ],
    ids=str,
)
def test_whole_blocks_have_the_eager_numbers_and_one_graph_for_each_role_map(kind: str, checkpointing: bool) -> None:
    """Also after their factors were written to, and nothing is compiled after the first turn."""
    network, roles = made(kind)
    counter, graphs = Counter(), []
    turns = [("teacher", False), ("student", True), ("mixed", False), ("mixed", True)]
    rights = []
    for scale in (0.1, 0.2):
        written(roles, scale)
        rights.append({which: turn(network, roles, *which) for which in turns})
    written(roles, 0)
    with ExitStack() as stack:
        if checkpointing:
            stack.enter_context(checkpoint_blocks([network.block], roles))
        stack.enter_context(compiled_blocks([network.block], roles, backend=counter))
        for scale, right in zip((0.1, 0.2), rights, strict=True):
            written(roles, scale)
            for which in turns:
                found = turn(network, roles, *which)
                assert len(found) == len(right[which])
                for mine, theirs in zip(found, right[which], strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
            graphs.append(counter.graphs)
    assert 3 <= graphs[0] == graphs[1] <= len(turns)
    assert "forward" not in network.block.__dict__


@pytest.mark.broad
@pytest.mark.parametrize("kind", ["resnet", pytest.param("transformer", marks=BROAD)])
def test_a_back_end_with_a_graph_for_backward_has_the_same_numbers(kind: str) -> None:
    network, roles = made(kind)
    for name in MAPS:
        right = turn(network, roles, name, True)
        blocks = [network.block]
        with checkpoint_blocks(blocks, roles), compiled_blocks(blocks, roles, backend="aot_eager"):
            for mine, theirs in zip(turn(network, roles, name, True), right, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7)


def test_threads_have_their_own_roles() -> None:
    network, roles = made("resnet")
    right = {name: turn(network, roles, name, False)[0] for name in MAPS}
    wrong: list[str] = []

    def draw(name: str) -> None:
        for _ in range(40):
            with torch.no_grad(), roles.rows(MAPS[name]), roles.capture(ROWS):
                found = network(network.inputs[0])
            if not torch.allclose(found, right[name], rtol=1e-9, atol=1e-9):
                wrong.append(name)

    with compiled_blocks([network.block], roles, backend="eager"):
        for name in MAPS:  # a compiler serves one thread
            turn(network, roles, name, False)
        threads = [threading.Thread(target=draw, args=(name,)) for name in MAPS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_an_error_leaves_plain_blocks_and_no_role() -> None:
    network, roles = made("resnet")
    with pytest.raises(ValueError, match="stop"), compiled_blocks([network.block], roles, backend="eager"):
        turn(network, roles, "student", False)
        raise ValueError("stop")
    assert "forward" not in network.block.__dict__
    with torch.no_grad():
        base = network(network.inputs[0])
    roles.remove()
    with torch.no_grad():
        assert torch.equal(base, network(network.inputs[0]))
