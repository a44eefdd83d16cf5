"""Runs whose last students are far worse than those before, which they have kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_host import SmallHost, small
from whole_runs import run


def spoiled(host: SmallHost, at: int) -> Callable[[Any], None]:
    """A report that makes the student and its mean far too strong after update ``at``: what was before is better."""

    def report(now: Any) -> None:
        if now.update == at and not now.preparing and now.numbers:
            for role in ("student", "ema"):
                for factor in host.denoiser.roles.parameters(role):
                    factor.detach().mul_(6.0)

    return report


def settings_of(**changes: Any) -> Any:
    return small(**{"candidate_every": 1, "candidates": 12, "choose_by": "distance", "watch_every": 1, **changes})


def spoiled_run(folder: Path, **changes: Any) -> Any:
    host = SmallHost()
    return run(folder, settings_of(**changes), host=host, report=spoiled(host, 7))
