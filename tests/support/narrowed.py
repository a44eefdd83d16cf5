"""Which cases of a matrix `make test` runs; `make test-all` runs them all."""

from __future__ import annotations

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
