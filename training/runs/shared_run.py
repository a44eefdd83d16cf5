"""A run's folder where several processes train: the first holds and writes it, the others read it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import OneStepError
from ..engine import processes
from .run import Run, opened


class Followed(Run):
    """The folder as the other processes see it: what they have to say is the first one's to write."""

    def load_last(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.load(processes.same(None))

    def adjust(self) -> str:
        return ""

    def record(self, name: str, value: Any) -> None:
        pass

    def save(self, update: int, tensors: dict[str, Tensor], notes: dict[str, Any], best: int | None) -> None:
        pass

    def log(self, line: dict[str, Any]) -> None:
        pass

    def forget_after(self, update: int) -> None:
        pass


class Led(Run):
    """The folder as the first of several processes sees it: all go on from the state that it could read."""

    def load_last(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, notes = super().load_last()
        processes.same(notes["update"])
        return tensors, notes


@contextmanager
def entered(
    folder: Path, config: dict[str, Any], device: torch.device, existing: str, adjustable: tuple[str, ...] = ()
) -> Iterator[tuple[Run, bool]]:
    """As `run.opened`, in every process: the first opens the folder, then the others follow it. Raises OneStepError too
    where there are more processes than samples in a batch or than GPUs, where they are not of one run, or do not see
    one folder. device: where this process trains."""
    processes.refuse_shared(device)
    processes.agree({name: config[name] for name in ("settings", "prompts", "base", "recipe")})
    processes.own(config["settings"]["batch"])
    if processes.is_first():
        with opened(folder, config, existing, adjustable) as (run, goes_on):
            processes.same([run.changes, goes_on])
            yield Led(folder, run.changes), goes_on
        return
    changes, goes_on = processes.same(None)
    if not (folder / "config.json").is_file():
        raise OneStepError(
            f"process {processes.rank()} does not see the run's folder {folder}, which the first one has made: it must "
            "lie where all machines see it"
        )
    yield Followed(folder, {name: (old, new) for name, (old, new) in changes.items()}), goes_on
