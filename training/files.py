"""Small text files that are whole or absent, as :mod:`core.tensor_file` writes tensors; and the log, a line at a
time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..core.errors import OneStepError


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` beside ``path``, sync it, and put it there in one move."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise OneStepError(
            f"{path} could not be written: {error.strerror}. Free some space or choose another folder"
        ) from None
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, json.dumps(value, indent=1).encode())


def read_json(path: Path) -> Any:
    """Raises OneStepError where the file is missing or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise OneStepError(f"{path} cannot be read ({error}): start anew, or restore the file") from None
