"""Triton's kernels are tested in its interpreter where there is no GPU, asked for before anything imports Triton."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_report_header() -> str:
    found = importlib.util.find_spec("triton") is not None
    return f"kernels: Triton is {'' if found else 'NOT '}installed{'' if found else ', its kernels are NOT tested'}"


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation in turn, forced."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed: `make test-kernels` installs and tests it")
    monkeypatch.setenv("ONESTEP_KERNELS", request.param)
    return str(request.param)
