"""Methods that ask a loss of the student at once: what learns, how a run of theirs is cut, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from narrowed import narrowed
from small_adapters import AT, BY_ADAPTER, BY_FACTORS, Shift
from small_host import SmallHost, small
from whole_runs import Cancelled, at_call, left, run, seen_under

from onestep.core.adapter_file import load_adapter
from onestep.core.errors import OneStepError
from onestep.core.lora_file import load_lora
from onestep.core.tensor_file import read_header, read_tensors
from onestep.training.methods import regression

CHANGES = {"method": "regression", "steps": 5, "ema": 0.5, "final_rate": 1.0, "warm_up": 1, "max_grad_norm": 0.0}


@pytest.fixture
def by_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "METHOD", BY_ADAPTER)


@pytest.fixture
def by_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "METHOD", BY_FACTORS)


def losses(result: object) -> list[float]:
    return [line["loss"] for line in result.metrics if "loss" in line]  # type: ignore[attr-defined]


def fell(values: list[float]) -> bool:
    """From the first third of the updates to the last; each looks at noise of its own."""
    third = len(values) // 3
    return sum(values[-third:]) < sum(values[:third])


def test_factors_learn_where_there_is_no_side(by_factors: None, tmp_path: Path) -> None:
    result = run(tmp_path / "run", small(**{**CHANGES, "steps": 12}, checkpointing=False))
    state = load_lora(result.path).state
    assert sum(float(b.abs().sum()) for _, b in state.values()) > 0
    assert fell(losses(result)) and len(losses(result)) == 12


def test_a_side_learns_alone_and_is_the_result(by_adapter: None, tmp_path: Path) -> None:
    result = run(tmp_path / "run", small(**{**CHANGES, "steps": 12}))
    assert fell(losses(result))
    adapter = load_adapter(result.path, {"shift": Shift.from_config}, "unet")
    assert adapter.kind == "shift" and bool((adapter.module.by != 0).all())
    assert torch.equal(adapter.module.scale, torch.linspace(1, 2, 8))
    assert json.loads(adapter.metadata["onestep.settings"])["method"] == "regression"
    assert "onestep.recipe" in adapter.metadata and result.check.startswith("the adapter reads back: 2 tensors on 1")
    assert {name for name in read_tensors(result.path)} == {"by", "scale"}


def test_the_sides_updates_are_adams_and_its_mean_is_kept(by_adapter: None, tmp_path: Path) -> None:
    """Adam (arXiv:1412.6980) by hand from the metrics-free start: its first step is the rate, against the sign."""
    result = run(tmp_path / "run", small(**{**CHANGES, "steps": 1, "watch_every": 0, "preview_every": 0}))
    tensors = read_tensors(max((tmp_path / "run").glob("state-1")) / "state.safetensors")
    by = tensors["student/by"].numpy()
    np.testing.assert_allclose(np.abs(by), 1e-2, rtol=1e-3)
    # the running mean is short at first: decay (1 + 1) / (10 + 1)
    np.testing.assert_allclose(tensors["ema/by"].numpy(), (1 - 2 / 11) * by, rtol=1e-5)
    assert result.role == "ema"
    np.testing.assert_allclose(
        load_adapter(result.path, {"shift": Shift.from_config}).module.by.detach(), tensors["ema/by"]
    )


def test_an_initial_lora_stays_as_it_is_under_a_side(
    by_factors: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = run(tmp_path / "lora", small(**CHANGES))
    monkeypatch.setattr(regression, "METHOD", BY_ADAPTER)
    host = SmallHost()
    settings = small(**CHANGES, initial_lora=str(first.path))
    run(tmp_path / "run", settings, host=host, report=seen_under(host, first.path))
    # what does not learn is in no state: a run begins with it anew
    tensors = read_tensors(tmp_path / "run" / "state-5" / "state.safetensors")
    assert f"student/{AT}/a" not in tensors and float(tensors["student/by"].abs().min()) > 0


@pytest.mark.parametrize("call", narrowed([3, 4, 6], 4))
def test_a_cancelled_run_ends_as_if_it_had_not_been(by_adapter: None, tmp_path: Path, call: int) -> None:
    settings = small(**CHANGES, accumulation=2)
    run(tmp_path / "whole" / "run", settings)
    with pytest.raises(Cancelled):
        run(tmp_path / "run", settings, host=SmallHost(on_poll=at_call(call, Cancelled())))
    if (tmp_path / "run" / "partial.safetensors").is_file():
        assert "onestep.adapter" in read_header(tmp_path / "run" / "partial.safetensors").metadata
    run(tmp_path / "run", settings, existing="continue")
    assert left(tmp_path / "run") == left(tmp_path / "whole" / "run")


def test_micro_batches_learn_the_same(by_adapter: None, tmp_path: Path) -> None:
    found = []
    for accumulation in (1, 4):
        result = run(tmp_path / str(accumulation), small(**CHANGES, accumulation=accumulation))
        found.append(load_adapter(result.path, {"shift": Shift.from_config}).module.by.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_the_host_is_given_back_without_side_and_hooks(by_adapter: None, tmp_path: Path) -> None:
    host = SmallHost()
    run(tmp_path / "run", small(**CHANGES), host=host)
    assert not host.denoiser.roles.names() and "student" not in host.denoiser.roles.modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.network.modules())


def test_a_side_of_another_base_is_refused(by_adapter: None, tmp_path: Path) -> None:
    host = SmallHost()
    host.denoiser.roles.targets.pop(AT)
    with pytest.raises(OneStepError, match="conv_in, which is not in this model"):
        run(tmp_path / "run", small(**CHANGES), host=host)
