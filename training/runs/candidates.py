"""Students that a run keeps on its way, from which its end may choose: the factors of the role that is shown, or its
adapter module, alone, in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ...core.errors import OneStepError
from ...core.memory import notice
from ...core.roles import Roles
from ...core.tensor_file import read_header, read_tensors, write_tensors
from ..engine.spacing import KEPT_AS
from ..engine.spacing import number as number
from ..engine.spacing import spacing as spacing
from ..settings import Settings
from .state import learnt

FOLDER = "candidates"


def keep(folder: Path, update: int, roles: Roles, role: str, settings: Settings) -> None:
    """Keep what ``role`` holds after ``update`` in the run's ``folder``, where it is due, and thin out the others.
    Where the disk refuses, the run goes on without."""
    every = spacing(update, settings)
    if not every:
        return
    if update % every == 0:
        place = folder / FOLDER
        values = {name: value.to(KEPT_AS) for name, value in learnt(roles, role).items()}
        try:
            place.mkdir(exist_ok=True)
            write_tensors(place / f"{update:06d}.safetensors", values, {"onestep.role": role})
        except (OSError, OneStepError) as error:
            notice(f"the student after update {update} could not be kept as a candidate: {error}")
    for other, path in kept(folder).items():
        if other % every:
            path.unlink(missing_ok=True)


def kept(folder: Path) -> dict[int, Path]:
    """The candidates of the run in ``folder`` by their updates, the first one first."""
    found = {int(path.stem): path for path in (folder / FOLDER).glob("*.safetensors") if path.stem.isdecimal()}
    return dict(sorted(found.items()))


def forget_after(folder: Path, update: int) -> None:
    """Drop those that the state after ``update`` does not know."""
    for other, path in kept(folder).items():
        if other > update:
            path.unlink(missing_ok=True)


def size_of(roles: Roles, role: str, settings: Settings) -> int:
    """Bytes on the disk of all that a run keeps."""
    each = sum(value.numel() * KEPT_AS.itemsize for value in learnt(roles, role).values())
    return each * settings.candidates if settings.candidate_every else 0


def read(path: Path, roles: Roles, role: str) -> dict[str, Tensor]:
    """What the candidate at ``path`` holds. Raises OneStepError where it cannot be read, or is not of this run."""
    shapes = {name: tuple(value.shape) for name, value in learnt(roles, role).items()}
    if {name: entry.shape for name, entry in read_header(path).tensors.items()} != shapes:
        raise OneStepError(f"{path.name} holds other layers or ranks than this run's students: delete it")
    return read_tensors(path)


@contextmanager
@torch.no_grad()
def in_place_of(roles: Roles, role: str, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, ``role`` holds ``values``; after, what it held before: no second adapter lies on the device."""
    live = learnt(roles, role)
    before = {name: value.to("cpu", copy=True) for name, value in live.items()}
    try:
        _write(live, values)
        yield
    finally:
        _write(live, before)


@torch.no_grad()
def _write(live: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in live.items():
        value.copy_(values[name])
