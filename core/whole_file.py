"""Files that are whole or absent: written beside their place, synced, and put there in one move."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from .errors import OneStepError


def write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    """Write ``pieces`` one after the other to ``path``. Raises OneStepError where the disk or the folder refuses."""
    # two machines may write one folder, from processes of one number
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise OneStepError(
            f"Cannot write {short(path)}: {error.strerror or error}. Free some disk space, or choose another folder."
        ) from None
    finally:
        beside.unlink(missing_ok=True)


def short(path: Path) -> str:
    """The path's end, for a message."""
    text = str(path)
    return text if len(text) <= 120 else "..." + text[-117:]
