"""The share of a card that a process allows itself, so that a driver does not lend it the host's memory."""

from __future__ import annotations

import pytest
import torch

from onestep.core.spill import limit, share, spills

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "total", "own", "wanted"),
    [(8, 8, 0, 0.98), (6, 8, 0, 0.73), (3, 8, 3, 0.73), (0, 24, 0, 0.05), (24, 24, 24, 1.0), (0.1, 24, 0, 0.05)],
)
def test_it_is_what_is_free_and_its_own_less_a_little(free: float, total: float, own: float, wanted: float) -> None:
    found = share(int(free * GIB), int(total * GIB), int(own * GIB))
    assert found == pytest.approx(wanted, abs=1e-3) and 0 < found <= 1


def test_nothing_is_limited_where_no_driver_spills() -> None:
    assert limit(torch.device("cpu")) is None and isinstance(spills(), bool)
