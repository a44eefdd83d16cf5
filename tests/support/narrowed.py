"""Which cases of a matrix `make test` runs; `make test-all` runs them all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def narrowed(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """``cases``, of which all but ``kept`` carry the marker `broad`. Raises ValueError for one to keep that is none."""
    found = list(cases)
    if strange := [case for case in kept if case not in found]:
        raise ValueError(f"{strange[0]!r} is none of the cases {found}")
    return [
        case if case in kept else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.broad)
        for case in found
    ]


def thinned(every: int, *axes: Iterable[Any]) -> list[Any]:
    """The product of ``axes``, of which every ``every``-th case stays. Raises ValueError where a value would be in none
    of them, as it is where ``every`` and a length have a divisor in common."""
    values = [list(axis) for axis in axes]
    cases = list(itertools.product(*values))
    kept = cases[::every]
    if lost := [value for at, axis in enumerate(values) for value in axis if all(case[at] != value for case in kept)]:
        raise ValueError(f"of every {every}th case none has {lost[0]!r}")
    return narrowed(cases, *kept)
