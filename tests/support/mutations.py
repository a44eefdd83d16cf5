"""Mutants of our own sources: a comparison with an oracle is worth something only if a wrong equation makes it fail."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType

import pytest


def mutant(name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module ``name`` with ``old`` replaced by ``new`` in its source, under a name of its own beside it."""
    original = importlib.import_module(name)
    source = inspect.getsource(original)
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {name}: mutate what is there now"
    module = ModuleType(f"{name}_mutant")
    module.__package__ = original.__package__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source.replace(old, new), module.__dict__)
    return module


def must_fail(check: Callable[[ModuleType], None], module: ModuleType) -> None:
    """``check`` finds the mutant out: a comparison fails, or the mutant cannot even run."""
    with pytest.raises((AssertionError, RuntimeError, TypeError)):
        check(module)
