"""Rehearsals on the disk: what was counted once is known on another day, for the same network, settings and code.

A file begins with the checksum of what it answers and of what is in it: one that is broken, cut off, or not of this key
is as none. Nothing is lost with the folder.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.errors import OneStepError
from ...core.whole_file import write_whole
from .rehearsed import Beside, PhaseWork, Rehearsed
from .trace import Cost, Count

CHOSEN, OFF = "ONESTEP_CACHE", "off"
"""The variable of the environment that names the folder, and what it says where nothing is to be kept."""
MOST = 64
"""Files that are kept: the oldest goes."""
LARGEST = 2**26
"""Bytes of a file that is looked at; one of SDXL has some 2**18."""
ARRAYS = ("parts", "label", "deltas")
COUNTED_BY = ("kernels", "core", "training", "pipelines", "nodes")
"""Folders of the package whose code a count may hang on."""


def read(key: str) -> Rehearsed | None:
    """What was written under ``key``; None where nothing usable is there."""
    path = _path(key)
    try:
        if path is None or path.stat().st_size > LARGEST:
            return None
        checksum, _, data = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return _unpacked(data) if checksum == _checksum(key, data) else None


def write(key: str, played: Rehearsed) -> None:
    """Keep ``played`` under ``key``, if the disk lets it be kept."""
    path = _path(key)
    if path is None:
        return
    data = _packed(played)
    with suppress(OSError, OneStepError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, [_checksum(key, data), b"\n", data])
        files = sorted(path.parent.glob("*.plan"), key=lambda file: file.stat().st_mtime)
        for file in files[:-MOST]:
            file.unlink(missing_ok=True)


@cache
def counted_by() -> str:
    """Of the code that counts: torch's version, the kernels that are asked for, and each file of the package's, as
    somebody may work on it or fetch a newer one of the same version."""
    root = Path(__file__).resolve().parents[2]
    files = sorted(file for folder in COUNTED_BY for file in (root / folder).rglob("*.py"))
    told = [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return repr((torch.__version__, np.__version__, os.environ.get("ONESTEP_KERNELS", ""), told))


def _path(key: str) -> Path | None:
    """Of a file whose name is a checksum, in the one folder where they lie."""
    chosen = os.environ.get(CHOSEN, "").strip()
    if chosen == OFF:
        return None
    try:
        folder = (
            Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onestep"
        )
    except RuntimeError:  # nobody's home
        return None
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()}.plan"


def _checksum(key: str, data: bytes) -> bytes:
    return hashlib.sha256(key.encode() + data).hexdigest().encode()


def _packed(played: Rehearsed) -> bytes:
    count = played.count
    told: dict[str, Any] = {name: _text(getattr(count, name)) for name in ARRAYS}
    told |= {"p": count.p, "r": count.r, "names": count.names, "labels": count.labels, "within": count.within}
    told["entered"] = [[*pair, times] for pair, times in count.entered.items()]
    told["counts"] = {
        part: [[cost.flops, cost.moved, cost.width, times] for cost, times in costs.items()]
        for part, costs in count.counts.items()
    }
    beside = {"gradients": played.gradients, "passes": played.passes, "beside": asdict(played.beside)}
    return json.dumps({"count": told, "phases": [asdict(phase) for phase in played.phases], **beside}).encode()


def _unpacked(data: bytes) -> Rehearsed:
    told = json.loads(data)
    count = told["count"]
    parts, label, deltas = (_array(count[name]) for name in ARRAYS)
    counts = {
        part: {Cost(flops, tuple(moved), width): times for flops, moved, width, times in costs}
        for part, costs in count["counts"].items()
    }
    entered = {(part, around): times for part, around, times in count["entered"]}
    names, labels = tuple(count["names"]), tuple(count["labels"])
    whole = Count(count["p"], count["r"], names, parts, labels, label, deltas, counts, count["within"], entered)
    phases = tuple(PhaseWork(**phase) for phase in told["phases"])
    return Rehearsed(whole, phases, told["gradients"], told["passes"], Beside(**told["beside"]))


def _text(numbers: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(numbers.astype("<i8").tobytes(), 6)).decode()


def _array(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i8").astype(np.int64)
