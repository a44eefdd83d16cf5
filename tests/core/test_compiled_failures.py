"""Blocks that cannot be compiled run as they are, with one line that says why; afterwards they are as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from narrowed import narrowed
from torch import Tensor, nn

from onestep.core import compiled
from onestep.core.checkpoint import Checkpoints, checkpoint_blocks
from onestep.core.compiled import compiled_blocks, gave_up
from onestep.core.memory import noticed
from onestep.core.recomputed import BLOCKS, FEED_FORWARDS, NOTHING
from onestep.core.roles import TEACHER, Roles
from onestep.core.targets import Target

ROWS = 3
ROLES: dict[str, Any] = {"student": [("student", ROWS)], "mixed": [(TEACHER, 1), ("student", 2)]}


class Block(nn.Module):
    """breaks: it writes to what no graph holds. fails: it has an error of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.breaks, self.fails = nn.Linear(6, 6), False, False

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        if self.fails:
            raise ZeroDivisionError("the block's own")
        return x + torch.tanh(self.inner(x)) * x.sin()


def made() -> tuple[nn.Sequential, Roles]:
    torch.manual_seed(0)
    network = nn.Sequential(Block(), Block(), Block()).eval().requires_grad_(False).double()
    roles = Roles([Target(f"{number}.inner", block.inner) for number, block in enumerate(network)])
    roles.add("student", 2, 0)
    for a, b in roles.state("student").values():
        b.copy_(a.flip(0).mT * 0.3)
    roles.install()
    return network, roles


def turn(network: nn.Module, roles: Roles, name: str = "student") -> list[Tensor]:
    """The answer and every gradient."""
    x = torch.linspace(-1, 1, ROWS * 6, dtype=torch.float64).reshape(ROWS, 6).requires_grad_(True)
    factors = roles.parameters("student")
    for factor in factors:
        factor.grad = None
    with roles.rows(ROLES[name]), roles.capture(ROWS):
        out = network(x)
    out.square().sum().backward()
    return [out.detach(), *(value.grad for value in (x, *factors) if value.grad is not None)]


def close(found: list[Tensor], right: list[Tensor]) -> None:
    assert len(found) == len(right)
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


class Failing:
    """A back end that compiles ``good`` graphs and then no more."""

    def __init__(
        self, good: int = 0, error: Callable[[], Exception] = lambda: RuntimeError("no compiler here")
    ) -> None:
        self.left, self.error = good, error

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise self.error()
        return graph.forward


def without_backward(graph: Any, inputs: Any) -> Any:
    """A back end that compiles no backward."""
    from torch._dynamo.backends.common import aot_autograd

    def fail(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler for backward")

    return aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=fail)(graph, inputs)


@contextmanager
def told() -> Iterator[list[str]]:
    notes: list[str] = []
    with noticed(notes):
        yield notes


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "good, checkpointing", narrowed([(good, how) for good in (0, 1, 2, 4) for how in (True, False)], (1, True))
)
def test_one_that_fails_leaves_the_run_the_eager_numbers(good: int, checkpointing: bool) -> None:
    """Also in the middle of a forward whose first blocks are compiled: each block's backward is its own forward's."""
    network, roles = made()
    right = {name: turn(network, roles, name) for name in ROLES}
    how = checkpoint_blocks(network, roles) if checkpointing else nullcontext()
    with told() as notes, how, compiled_blocks(network, roles, backend=Failing(good)):
        for name in (*ROLES, *ROLES):
            close(turn(network, roles, name), right[name])
        assert all("forward" not in vars(block) for block in network)
    assert len(notes) == 1 and "no compiler here" in notes[0] and "compile_blocks" in notes[0]


@pytest.mark.parametrize("checkpointing", narrowed([True, False], True))
def test_one_whose_backward_fails(checkpointing: bool) -> None:
    """torch compiles it in backward: whoever made the forward makes both again."""
    network, roles = made()
    right = turn(network, roles)
    how = checkpoint_blocks(network, roles) if checkpointing else nullcontext()
    with told() as notes, how, compiled_blocks(network, roles, backend=without_backward):
        with pytest.raises(RuntimeError, match="no compiler for backward") as raised:
            turn(network, roles)
        assert gave_up(raised.value)
        close(turn(network, roles), right)
    assert len(notes) == 1 and "no compiler for backward" in notes[0]


def test_other_errors_are_nobodys_reason_to_go_on() -> None:
    """Nor a compiler's own where nothing of ours is compiled."""
    network, roles = made()
    with told() as notes, compiled_blocks(network, roles, backend="eager"):
        assert not gave_up(RuntimeError("another")) and not gave_up(torch.OutOfMemoryError("out of memory"))
        assert "forward" in vars(network[0])
    with pytest.raises(RuntimeError) as raised:
        torch.compile(lambda x: x.sin(), backend=Failing())(torch.ones(2))
    assert not gave_up(raised.value) and not notes


def test_a_block_that_is_no_whole_graph() -> None:
    network, roles = made()
    right = turn(network, roles)
    network[1].breaks = True
    with told() as notes, compiled_blocks(network, roles, backend="eager"):
        close(turn(network, roles), right)
    assert len(notes) == 1


def test_memory_that_runs_out_is_no_compilers_fault() -> None:
    """Whoever trains makes do with less, and goes on compiled."""
    network, roles = made()
    right, short = turn(network, roles), [True]

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            if short:
                short.clear()
                raise torch.OutOfMemoryError("CUDA out of memory")
            return graph.forward(*args)

        return run

    with told() as notes, compiled_blocks(network, roles, backend=backend):
        with pytest.raises(torch.OutOfMemoryError):
            turn(network, roles)
        close(turn(network, roles), right)
        assert all("forward" in vars(block) for block in network)
    assert not notes


def test_a_blocks_own_error_is_raised_as_it_is() -> None:
    network, roles = made()
    network[2].fails = True
    whole = compiled_blocks(network, roles, backend="eager")
    with told() as notes, pytest.raises(ZeroDivisionError, match="the block's own"), whole:
        turn(network, roles)
    assert not notes and all("forward" not in vars(block) for block in network)


def test_a_forward_that_somebody_set_is_given_back() -> None:
    network, roles = made()
    own = network[0].forward
    network[0].forward = own
    with pytest.raises(KeyError), compiled_blocks(network, roles, backend="eager"):
        assert network[0].forward is not own
        raise KeyError
    assert vars(network[0])["forward"] is own and "forward" not in vars(network[1])


def test_a_torch_that_counts_all_blocks_graphs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As older ones do: nothing is compiled, and a line says why."""
    network, roles = made()
    monkeypatch.setattr(compiled.torch, "compile", lambda model, *, fullgraph=False, backend="inductor": 1 / 0)
    with told() as notes, compiled_blocks(network, roles):
        assert all("forward" not in vars(block) for block in network)
    assert len(notes) == 1 and torch.__version__ in notes[0]


@pytest.mark.broad
def test_without_a_compiler_of_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own back end on a CPU, on a machine that has none, as most with Windows."""
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    network, roles = made()
    right = turn(network, roles)
    missing = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with fresh_cache(), missing, told() as notes, compiled_blocks(network, roles):
        close(turn(network, roles), right)
    assert len(notes) == 1, notes


def test_feed_forwards_are_computed_again_with_their_blocks() -> None:
    """Nothing may hang inside a block that is one graph."""
    network, roles = made()
    for whole, grades in ((True, [NOTHING, BLOCKS, BLOCKS]), (False, [NOTHING, FEED_FORWARDS, BLOCKS])):
        checkpoints = Checkpoints(network, roles, NOTHING, whole)
        for grade, right in zip((NOTHING, FEED_FORWARDS, BLOCKS), grades, strict=True):
            checkpoints.use(grade)
            assert checkpoints.grade == right
        checkpoints.remove()
