"""A run's lock: one process at a time trains in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ...core.errors import OneStepError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """An operating-system lock, which dies with its process: a killed run leaves nothing to clean up."""
    try:
        file = open(path, "a+b")  # noqa: SIM115  (closed below; opening and locking fail for different reasons)
    except OSError as error:
        raise OneStepError(
            f"nothing can be written in {path.parent}: {error.strerror}. Choose another folder"
        ) from None
    with file:
        try:
            _lock(file)
        except OSError:
            raise OneStepError(
                f"the run in {path.parent} is being trained by another process: wait for it, or give another name"
            ) from None
        yield


def _lock(file: BinaryIO) -> None:
    if os.name == "nt":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
