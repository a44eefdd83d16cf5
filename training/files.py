"""Files that are whole or absent: written beside their place, synced, and moved there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..core.errors import OneStepError


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` whole. Raises OneStepError where the disk is full or the folder cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OneStepError(f"{path} could not be written: {error.strerror}. Free some space or choose another folder") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> None:
    """A .safetensors of ``tensors``, with ``notes`` as JSON in its header."""
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_bytes(path, save(contiguous, {"notes": json.dumps(notes or {})}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and notes of a file that :func:`write_tensors` made; nothing of the file stays open or mapped."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {}).get("notes", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise OneStepError(f"{path} cannot be read ({error}): delete it, it will be made again") from error


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, json.dumps(value, indent=1).encode())
