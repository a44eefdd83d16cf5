"""Every phase of a run with too little memory: it goes on in smaller slices and learns the same, or says so and leaves
its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import narrowed
from small_host import SmallHost, small
from torch import Tensor
from whole_runs import factors, left, newest, run

from onestep.core.cond import Cond
from onestep.core.memory import OutOfMemory
from onestep.core.tensor_file import read_tensors
from onestep.training.runs.run import Run

QUIET: dict[str, Any] = {"watch_every": 0, "preview_every": 0}
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


class Cramped(SmallHost):
    """Holds no more rows of a forward than ``without`` a gradient, and than ``with_`` one; no more texts than
    ``listed``."""

    without, with_, listed, error = 10**6, 10**6, 10**6, ERRORS[0]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.most = 0
        self.network.register_forward_pre_hook(self._ask)

    def _ask(self, module: Any, args: tuple[Any, ...]) -> None:
        if len(args[0]) > (self.with_ if torch.is_grad_enabled() else self.without):
            raise self.error
        self.most = max(self.most, len(args[0]))

    def texts(self, prompts: Any, negative: bool = False) -> Cond:
        if len(prompts) > self.listed:
            raise self.error
        return super().texts(prompts, negative)


def cramped(error: Exception = ERRORS[0], **most: int) -> Cramped:
    host = Cramped()
    host.error = error
    for name, rows in most.items():
        setattr(host, name, rows)
    return host


def near(a: dict[str, Tensor], b: dict[str, Tensor], least: float = 2e-3) -> bool:
    """Slices of other sizes are rounded otherwise, and Adam's first steps are of the gradient's sign."""
    return a.keys() == b.keys() and all(
        float((a[n] - b[n]).abs().max()) < least * (1 + float(b[n].abs().max())) for n in a
    )


METHODS = {
    "regression": {"sizes": "32x32"},
    "dmd": {"anchor": 0.5},
    "guidance-lora": {"states": 2},
}


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(ERRORS[0], id="torch"),
        *(pytest.param(one, id="cublas", marks=pytest.mark.broad) for one in ERRORS[1:]),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_pictures_of_the_teacher_are_the_same_in_smaller_slices(tmp_path: Path, method: str, error: Exception) -> None:
    """Two rows of guidance a sample: samples one at a time."""
    settings = small(method=method, steps=2, learning_rate=1e-4, **METHODS[method], **QUIET)
    whole, host = run(tmp_path / "whole", settings), cramped(error, without=3)
    if method == "dmd":
        host.with_ = 1  # the student's turn has three scores of a sample
    found = run(tmp_path / "halved", settings, host=host)
    assert any("out of memory: the teacher's pictures in slices of 1" in note for note in found.notes), found.notes
    kind = "trajectories" if method == "guidance-lora" else "pairs"
    for path in sorted((tmp_path / "whole" / kind).iterdir()):
        made, wanted = read_tensors(tmp_path / "halved" / kind / path.name), read_tensors(path)
        assert near({n: v.float() for n, v in made.items()}, {n: v.float() for n, v in wanted.items()})
    assert near(read_tensors(found.path), read_tensors(whole.path))


def test_texts_are_encoded_in_smaller_slices(tmp_path: Path) -> None:
    settings = small(method="regression", steps=2, **QUIET)
    host = cramped(listed=2)
    found = run(tmp_path / "halved", settings, host=host)
    assert factors(found.path) == factors(run(tmp_path / "whole", settings).path)
    assert host.encoded == 6 and any("the texts in slices of 2" in note for note in found.notes), found.notes


def test_the_watch_draws_no_more_at_once_than_a_step_takes(tmp_path: Path) -> None:
    """Eight samples, two a micro-batch, two rows each of guidance."""
    settings = small(method="regression", accumulation=2, watch_samples=8, steps=3)
    host = cramped(without=4)
    found = run(tmp_path / "run", settings, host=host)
    assert host.most == 4 and not any("out of memory" in note for note in found.notes), found.notes


@pytest.mark.parametrize("rows", narrowed([2, 5], 2))
def test_the_watch_halves_what_it_draws_and_measures_the_same(tmp_path: Path, rows: int) -> None:
    settings = small(method="regression", watch_samples=8, steps=3, preview_every=2)
    whole, host = run(tmp_path / "whole", settings), cramped(without=rows)
    found = run(tmp_path / "halved", settings, host=host)
    assert any("the watch's pictures in slices of" in note for note in found.notes), found.notes
    for a, b in zip(found.metrics, whole.metrics, strict=True):
        assert a.get("distance", 0) == pytest.approx(b.get("distance", 0), rel=1e-2)
    assert found.preview and found.preview.is_file()


def test_a_step_that_fits_nowhere_leaves_its_state(tmp_path: Path) -> None:
    """From update 5 on, another program fills the card: what four updates have learnt is kept, and goes on."""
    settings = small(**QUIET, save_every=0)
    whole = run(tmp_path / "whole", settings)
    host = cramped()

    def fill(progress: Any) -> None:
        if progress.update == 5:
            host.with_ = host.without = 0

    with pytest.raises(OutOfMemory, match=r"out of memory in the \w+'s step, with one sample at a time"):
        run(tmp_path / "torn", settings, host=host, report=fill)
    assert Run(tmp_path / "torn").states() == [0, 5] and (tmp_path / "torn" / "partial.safetensors").is_file()
    found = run(tmp_path / "torn", settings, existing="continue")
    assert near(read_tensors(found.path), read_tensors(whole.path), 0.05)


def test_the_optimisers_step_that_has_no_room_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tensors may have moved: nothing of it is saved."""
    settings = small(**QUIET, save_every=2)
    run(tmp_path / "whole", settings)
    real, calls = torch.optim.AdamW.step, iter(range(10**6))

    def step(self: Any, closure: Any = None) -> Any:
        found = real(self, closure)
        if next(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(OutOfMemory, match="in the optimiser's step .*what was learnt is in the last state"):
        run(tmp_path / "torn", settings)
    saved = newest(tmp_path / "torn").name
    monkeypatch.undo()
    run(tmp_path / "torn", settings, existing="continue")
    whole, torn = (left(tmp_path / name) for name in ("whole", "torn"))
    whole["files"].pop("result.safetensors"), torn["files"].pop("result.safetensors")
    assert saved == "state-4" and torn == whole
