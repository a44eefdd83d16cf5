"""Small files of text and JSON, whole or absent."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from ...core.errors import OneStepError
from ...core.whole_file import write_whole
from ...core.words import in_gb as in_gb

CONTENT = "sha256 "


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all."""
    write_whole(path, [data])


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, json.dumps(value, indent=1).encode())


def read_json(path: Path) -> Any:
    """Raises OneStepError where the file is missing or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise OneStepError(f"{path} cannot be read ({error}): start anew, or restore the file") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, if there is one; without those that are none, as of a machine that lost its power."""
    lines = path.read_text("utf-8", errors="replace").split("\n") if path.is_file() else []
    return [row for line in lines if (row := _row(line)) is not None]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("update"), int) else None


def content_of(path: str | Path) -> str:
    """What is in a file, wherever it lies, as a short text."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            sha.update(part)
    return f"{CONTENT}{sha.hexdigest()[:16]}"


def room_at(folder: Path) -> int:
    """Bytes that are free on the disk that ``folder`` is on."""
    return shutil.disk_usage(folder).free
