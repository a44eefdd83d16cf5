"""Networks under torch.compile, wrapped or in place, and the hooks that act in spite of it."""

from __future__ import annotations

import torch
from torch import nn

from onestep.core.compiled import uncompile, uncompiled, unwrapped
from onestep.core.ordinary import make_ordinary


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.second(self.first(x))


def count_graphs():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)

        def run(*args):
            graphs.append("run")
            return graph.forward(*args)

        return run

    return graphs, backend


def test_the_network_inside_is_found() -> None:
    plain = Small()
    assert unwrapped(plain) is plain
    assert unwrapped(torch.compile(plain, backend="eager")) is plain
    assert unwrapped(None) is None


def test_hooks_act_while_it_is_uncompiled() -> None:
    for wrap in (True, False):
        plain, (graphs, backend), x = Small(), count_graphs(), torch.ones(1, 2)
        called = torch.compile(plain, backend=backend) if wrap else plain
        if not wrap:
            plain.compile(backend=backend)
            plain.second.compile(backend=backend)
        expected = called(x)
        ran = graphs.count("run")
        assert ran
        compile_again = uncompile(called)
        handle = plain.first.register_forward_hook(lambda module, args, output: output + 1)
        moved = called(x)
        assert graphs.count("run") == ran
        torch.testing.assert_close(moved, expected + plain.second.weight.sum(1))
        handle.remove()
        compile_again()
        torch.testing.assert_close(called(x), expected)
        assert graphs.count("run") > ran


def test_wrappers_may_stay_compiled() -> None:
    graphs, backend = count_graphs()
    called, x = torch.compile(Small(), backend=backend), torch.ones(1, 2)
    compile_again = uncompile(called, wrapped=False)
    called(x)
    assert graphs.count("run") == 1
    compile_again()
    with uncompiled(called):
        called(x)
    assert graphs.count("run") == 1


def test_inference_tensors_become_ordinary_ones() -> None:
    with torch.inference_mode():
        network = Small()
        network.second.weight = network.first.weight  # tied
        network.register_buffer("kept", torch.ones(3))
        network.first.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    make_ordinary(network)
    assert not any(value.is_inference() for value in (*network.parameters(), *network.buffers()))
    assert network.first.weight is network.second.weight and not network.first.weight.requires_grad
    assert network.first.bias.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network(torch.ones(1, 2)).sum().backward()
    same = network.first.bias
    make_ordinary(network)
    assert network.first.bias is same
