"""Memory that runs out once, at any forward, at the decoding or at the saving of a run: it goes on, or says so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from every_method import host_of, short
from narrowed import narrowed
from small_host import SmallHost, small
from torch import Tensor
from whole_runs import factors, newest, run

from onestep.core import tensor_file
from onestep.core.memory import is_out_of_memory
from onestep.core.tensor_file import read_tensors
from onestep.training.methods import METHODS
from onestep.training.runs import run as runs
from onestep.training.runs.run import NotSaved

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError("not in the host either"),
]


@dataclass
class Full:
    """A host whose ``at``-th forward finds no memory; those after it do. calls: forwards so far."""

    host: Any
    at: int = -1
    error: Exception = ERRORS[0]
    calls: int = 0

    def __post_init__(self) -> None:
        self.host.network.register_forward_pre_hook(self._ask, with_kwargs=True)

    def _ask(self, module: Any, args: Any, kwargs: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error


def near(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Slices of other sizes are rounded otherwise, and Adam's first steps are of the gradient's sign."""
    return a.keys() == b.keys() and all(float((a[n] - b[n]).abs().max()) < 5e-3 for n in a)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-step LoRA of the small checkpoint."""
    settings = small(method="regression", steps=1, start=0.6, watch_every=0, preview_every=0)
    return run(tmp_path_factory.mktemp("lora") / "run", settings).path


@pytest.mark.parametrize(("method", "places"), narrowed([("dmd", 5), *((name, 9) for name in METHODS)], ("dmd", 5)))
def test_a_run_goes_on_wherever_it_finds_no_memory_once(tmp_path: Path, method: str, places: int, lora: Path) -> None:
    """Places from the first forward to the last: pictures, reference, turns of each role, watch and preview."""
    own = {"sizes": "32x32", "steps": 2, "watch_every": 1, "preview_every": 1, "learning_rate": 1e-4, "batch": 2}
    own |= {"initial_lora": str(lora)} if method == "nct" else {}
    settings = small(**own | short(method, tmp_path))
    plain = Full(host_of(method))
    whole = run(tmp_path / "whole", settings, host=plain.host)
    for number, at in enumerate(torch.linspace(1, plain.calls, places).long().tolist()):
        host = Full(host_of(method), at, ERRORS[number % len(ERRORS)])
        found = run(tmp_path / f"{at}", settings, host=host.host)
        assert host.calls > plain.calls and any("out of memory" in note for note in found.notes), (at, found.notes)
        assert near(read_tensors(found.path), read_tensors(whole.path)), at


@pytest.mark.parametrize("error", narrowed(ERRORS, ERRORS[0]), ids=["torch", "cublas", "cudnn", "host"])
def test_a_preview_that_cannot_be_decoded_is_left_out(tmp_path: Path, error: Exception) -> None:
    settings = small(method="regression", steps=2, preview_every=1)
    whole, host = run(tmp_path / "whole", settings), SmallHost()

    def decode(latents: Tensor) -> Tensor:
        raise error

    host.decode = decode  # type: ignore[method-assign]
    found = run(tmp_path / "run", settings, host=host)
    assert is_out_of_memory(error) and factors(found.path) == factors(whole.path) and found.preview is None
    assert any("previews that could not be decoded" in note for note in found.notes), found.notes


def test_a_state_that_cannot_be_written_for_lack_of_memory_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small(method="regression", steps=4, save_every=2, watch_every=0, preview_every=0)
    whole = run(tmp_path / "whole", settings)
    write, to_bytes = runs.write_tensors, tensor_file._bytes
    now = {"path": Path()}

    def known(path: Path, tensors: dict[str, Tensor]) -> None:
        now["path"] = path
        write(path, tensors)

    def full(tensor: Tensor) -> Any:
        if "state-4" in str(now["path"]):
            raise MemoryError
        return to_bytes(tensor)

    monkeypatch.setattr(runs, "write_tensors", known)
    monkeypatch.setattr(tensor_file, "_bytes", full)
    with pytest.raises(NotSaved, match="state 4 could not be saved .*no memory is left"):
        run(tmp_path / "torn", settings)
    monkeypatch.undo()
    assert newest(tmp_path / "torn").name == "state-2"
    found = run(tmp_path / "torn", settings, existing="continue")
    assert factors(found.path) == factors(whole.path)
