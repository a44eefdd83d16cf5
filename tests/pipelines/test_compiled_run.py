"""A pipeline whose blocks are compiled while it is trained: each family's run is the eager one's but for rounding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import make

import onestep
from onestep.core.compiled import compiled_blocks
from onestep.core.tensor_file import read_tensors
from onestep.pipelines.adapt import adapt
from onestep.training.engine import setup

FEW: dict[str, Any] = {"steps": 2, "batch": 2, "pairs": 2, "teacher_steps": 2, "rank": 2, "sizes": "16x16"}
FEW |= {"watch_every": 0, "preview_every": 0, "learning_rate": 1e-3}


class Counted:
    """A back end with a graph for backward, and how often it compiled."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.broad
@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_a_run_is_the_eager_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No block falls back, and the pipeline is as it was."""
    backend, found = Counted(), {}
    monkeypatch.setattr(setup, "compiled_blocks", partial(compiled_blocks, backend=backend))
    for how in (False, True):
        pipe = make(name)
        found[how] = onestep.distill(pipe, ["a cat"], "regression", out=tmp_path / str(how), compile_blocks=how, **FEW)
        assert all("forward" not in vars(module) for module in adapt(pipe).network.modules())
    assert backend.graphs >= 2 * len(adapt(pipe).blocks)
    assert not any("compile" in note for note in found[True].notes)
    eager, compiled = (read_tensors(found[how].path) for how in (False, True))
    assert eager.keys() == compiled.keys()
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-3, atol=1e-5)
    print(name, len(adapt(pipe).blocks), backend.graphs)
