"""On which device and in which numbers a model is trained, where nobody says it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from tiny_pipelines import make

import onestep
from onestep.cli.model import device_of
from onestep.pipelines.adapt import adapt
from onestep.pipelines.load import best_device


@pytest.mark.parametrize("gpu", [False, True])
def test_the_command_and_python_choose_alike(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert best_device() == device_of(None) == torch.device("cuda" if gpu else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the path would be trained on it")
def test_a_path_goes_to_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where torch says there is one: this torch's complaint that it has none is as far as a CPU can go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises((AssertionError, RuntimeError), match="(?i)cuda|nvidia"):
        onestep.distill("tiny", ["a cat"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    few = {"steps": 1, "warm_start": 0, "critic_warm_up": 0, "critic_updates": 1, "rank": 1, "batch": 1, "pairs": 1}
    result = onestep.distill("tiny", ["a cat"], out=tmp_path / "run", watch_every=0, preview_every=0, **few)
    assert result.path.is_file()


def test_a_float32_base_on_a_gpu_is_warned_of() -> None:
    """With what to write; not on a CPU, and not for half the bytes."""
    for kind, half in (("sd", "float16"), ("flux", "bfloat16")):
        with pytest.warns(UserWarning, match=f"is float32 on cuda.*torch_dtype=torch.{half}[)]") as caught:
            adapt(make(kind), device="cuda").release()
        assert caught[0].filename == __file__, "the line that is to be changed is the caller's"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapt(make(kind)).release()
            for dtype in (torch.bfloat16, torch.float16):
                adapt(make(kind).to(dtype), device="cuda").release()
