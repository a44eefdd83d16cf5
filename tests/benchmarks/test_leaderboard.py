"""The board: runs cost what was asked for, true draws have no divergence, and rows are ordered by their means."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import narrowed

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks" / "leaderboard"))

import mixture  # noqa: E402
import table  # noqa: E402
from budget import costs, scaled, settled  # noqa: E402
from rows import known, methods_in, one, ranked, settings_of  # noqa: E402
from worlds import world_of  # noqa: E402

FORWARDS = 200


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    """A board of the mixture, with a network that has learnt for a moment."""
    runs = tmp_path_factory.mktemp("board")
    mixture.base("flow", runs / "mixture-flow.safetensors", updates=20, batch=16)
    told = {"world": "mixture", "prediction": "flow", "runs": runs, "out": runs / "page.md", "reference": None}
    return argparse.Namespace(**told, samples=50, batch=4, forwards=FORWARDS)


def test_true_draws_are_the_mixture() -> None:
    draws = torch.Generator().manual_seed(0)
    true = [mixture.draw(torch.full((20000,), at), draws) for at in range(len(mixture.PROMPTS))]
    found = mixture.measures(true)
    assert found["modes"] == 16 and found["off"] < 1e-3
    assert 0 <= found["kl"] < 0.02 and 0 <= found["kl_back"] < 0.02
    fewer = mixture.measures(
        [points[(points - mixture.modes(at)[0]).norm(dim=1) > 0.4] for at, points in enumerate(true)]
    )
    assert fewer["modes"] == 12 and fewer["kl_back"] > 1 > fewer["kl"], (
        "a mode that is left out shows in one of the two"
    )


@pytest.mark.parametrize(
    "method", narrowed(sorted({*methods_in(1), *methods_in(4)}), "dmd2", "progressive", "phased-dmd")
)
def test_a_run_costs_what_was_asked_for_and_no_update_less(args: argparse.Namespace, method: str) -> None:
    world = world_of(args)
    settings = settings_of(method, 4, 0, world, args.batch)
    with costs(world.host(), world.prompts, settings) as cost:
        found = settled(settings, 2000, cost)
        assert cost(found) <= 2000 < cost(scaled(found, found.steps + max(1, found.steps // 100) + 1))


def test_a_row_is_made_and_shown_and_one_that_fails_says_why(args: argparse.Namespace) -> None:
    one(("regression", 1, 0), args)
    one(("progressive", 1, 0), argparse.Namespace(**{**vars(args), "batch": -1}))
    made, failed = known(args.runs / "rows.jsonl")
    assert made["method"] == "regression" and made["forwards"] <= FORWARDS and made["kl"] > 0
    assert failed["method"] == "progressive" and "batch" in failed["failed"]
    table.page(args, [made, failed])
    page = args.out.read_text()
    assert "| `regression` |" in page and "| `progressive` | failed:" in page and "the mixture itself" in page
    assert args.out.with_suffix(".png").is_file()


def test_the_order_is_of_means() -> None:
    rows: list[dict[str, Any]] = [
        *({"method": "a", "kl": kl} for kl in (1.0, 4.0)),
        {"method": "b", "kl": 2.0},
        {"method": "c", "failed": "why"},
    ]
    assert ranked(rows, lambda found: float(found["kl"])) == ["b", "a"]
