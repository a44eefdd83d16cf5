"""Makes the checkout importable as `onestep`, whatever its folder is called, and nothing else of it importable."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["ONESTEP_CACHE"] = "off"  # a test counts what it counts

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def _forget_root() -> None:
    """`python -m pytest` puts the checkout on sys.path, where our `nodes` would shadow ComfyUI's nodes.py."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]


def _register_checkout() -> None:
    """Load the checkout as `onestep`; this copy wins over an installed one."""
    spec = importlib.util.spec_from_file_location(
        "onestep", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["onestep"] = package
    spec.loader.exec_module(package)


_forget_root()
_register_checkout()
# Tiny tensors gain nothing from threads, and one thread draws the same numbers on every machine. Runs that a test
# starts keep to the number too, rather than to time themselves.
os.environ["OMP_NUM_THREADS"] = os.environ.get("ONESTEP_TEST_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_finish() -> None:
    """What collecting has imported stays: a collection of garbage need not walk through it, which takes half a second,
    again and again where memory runs out."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes one runs all that asks a ComfyUI: a server takes half a minute to start and to be given its
    checkpoints. The other files go to whoever is free, each to one."""
    from xdist.scheduler import LoadFileScheduling

    class OneForComfyUI(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/nodes" if nodeid.startswith("tests/nodes/") else super()._split_scope(nodeid)

    return OneForComfyUI(config, log)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """Every test starts from the same global seed, so that none depends on the one before it. Of the CPU: manual_seed
    also writes down for each kind of device from where it was called, which takes longer than most tests."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
