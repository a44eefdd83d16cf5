"""Safetensors files, read with suspicion and written whole: never a pickle, never half a file under a good name.

The format: 8 bytes with the header's length, the header (JSON), the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). Own code, because the reader must answer for every broken header,
must not keep a file mapped that is written again later (Windows refuses, Linux reads garbage), and the writer must give
the same bytes for the same content.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from torch import Tensor

from .errors import OneStepError
from .memory import is_out_of_memory
from .whole_file import short, write_whole

MAX_HEADER_BYTES = 32 * 2**20
MAX_TENSORS = 100_000
MAX_NAME = 1_000
MAX_DIMENSIONS = 8

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: [start, stop) in bytes behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """tensors by name; metadata: the strings under __metadata__; data_start: where the tensors' bytes begin."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """Parse and check the header alone; reads no tensor. Raises OneStepError for anything that is not sound."""
    with _opened(Path(path)) as file:
        return _header(Path(path), file)


def read_tensors(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """All tensors of a file, or those of these names, on the CPU, in memory of their own."""
    with _opened(Path(path)) as file:
        header = _header(Path(path), file)
        return {name: _tensor(file, header, name) for name in (header.tensors if names is None else names)}


def read_tensor(path: str | os.PathLike[str], header: Header, name: str) -> Tensor:
    """One tensor of a file whose header has been read, as `read_tensors` does."""
    with _opened(Path(path)) as file:
        return _tensor(file, header, name)


def map_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU, read as they are used: only for a file that is never written again. What is
    written to them stays in memory."""
    with _opened(Path(path)) as file:
        header = _header(Path(path), file)
    return {name: _mapped(Path(path), header.data_start, entry) for name, entry in header.tensors.items()}


def each_tensor(path: str | os.PathLike[str], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of these names one after another, so that whoever keeps less than all never holds all."""
    with _opened(Path(path)) as file:
        header = _header(Path(path), file)
        yield from ((name, _tensor(file, header, name)) for name in names)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a whole file beside its place, sync it, and put it there in one move. Same content, same bytes. Raises
    OneStepError where the host has no memory left for a tensor of a card."""
    ordered = {name: tensors[name].detach() for name in sorted(tensors)}
    # one tensor after the other comes to the host's memory
    write_whole(Path(path), chain([_head(ordered, metadata or {})], map(_piece, ordered.values())))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the tensors' bytes as they lie in a file, as modelspec wants it: 0x..."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(_piece(tensors[name].detach()))
    return "0x" + sha.hexdigest()


def _piece(tensor: Tensor) -> Any:
    """A tensor's bytes, in the host's memory."""
    try:
        return _bytes(tensor.to("cpu").contiguous())
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OneStepError("no memory is left in which to write a file: close other programs") from None


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise OneStepError(f"Cannot read {short(path)}: {why}. Check the path.") from None


def _head(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _tensor(file: BinaryIO, header: Header, name: str) -> Tensor:
    entry = header.tensors[name]
    file.seek(header.data_start + entry.start)
    buffer = bytearray(entry.stop - entry.start)
    if not buffer:
        return torch.empty(entry.shape, dtype=entry.dtype)
    if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise OneStepError(f"{name[:60]!r} could not be read to its end: the file was cut off meanwhile. Try again.")
    return torch.frombuffer(buffer, dtype=entry.dtype).reshape(entry.shape)


def _mapped(path: Path, data_start: int, entry: Entry) -> Tensor:
    if entry.stop == entry.start:
        return torch.empty(entry.shape, dtype=entry.dtype)
    place = data_start + entry.start
    # copies of its pages on write: the file stays as it is
    raw = np.memmap(path, np.uint8, "c", place, (entry.stop - entry.start,))
    return torch.from_numpy(raw).view(entry.dtype).reshape(entry.shape)


def _header(path: Path, file: BinaryIO) -> Header:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    _refuse_pickle(path, start)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= MAX_HEADER_BYTES:
        _refuse(path, f"its header would be {length} bytes long" if len(start) == 8 else f"it has only {size} bytes")
    if 8 + length > size:
        _refuse(path, f"it is cut off: its header should be {length} bytes long, the whole file has {size}")
    try:
        content = _parsed(file.read(length))
    except (ValueError, RecursionError):
        _refuse(path, "its header is not valid JSON")
    except _TooMany:
        _refuse(path, f"it promises more than {MAX_TENSORS} tensors")
    if not isinstance(content, dict):
        _refuse(path, "its header is not a table of tensors")
    metadata = _metadata(path, content.pop("__metadata__", {}))
    entries = {name: _entry(path, name, value) for name, value in content.items()}
    _check_layout(path, entries, size - 8 - length)
    return Header(entries, metadata, 8 + length)


def _parsed(raw: bytes) -> Any:
    content = json.loads(raw.decode(), object_pairs_hook=_Unique(), parse_constant=_no_constant)
    if b"\\u" in raw:
        # Half a surrogate pair is legal JSON, but no text: it could neither be printed nor written again.
        json.dumps(content, ensure_ascii=False).encode()
    return content


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        _refuse(path, "its __metadata__ does not hold strings")
    return value


def _entry(path: Path, name: str, value: Any) -> Entry:
    if len(name) > MAX_NAME or not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"the entry {name[:60]!r} of its header is malformed")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    shape, offsets = value["shape"], value["data_offsets"]
    if dtype is None or not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        _refuse(path, f"the entry {name[:60]!r} of its header has an unknown type, shape or place")
    if len(shape) > MAX_DIMENSIONS or math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        _refuse(path, f"the shape {str(shape)[:60]} of {name[:60]!r} does not fit its {offsets[1] - offsets[0]} bytes")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _check_layout(path: Path, entries: Mapping[str, Entry], size: int) -> None:
    """The tensors lie behind each other without gaps, from the header to the file's end."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            _refuse(path, f"its tensors overlap or leave a gap at {name[:60]!r}")
        at = entry.stop
    if at != size:
        what = "it is cut off" if at > size else "bytes are left over"
        _refuse(path, f"{what}: its tensors should take {at} bytes, {size} are there")


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


class _TooMany(Exception):
    """The header promises more tensors than are read."""


class _Unique:
    """Makes the tables of a header: each key once, and no more tables than MAX_TENSORS and the two about them."""

    def __init__(self) -> None:
        self.tables = 0

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self.tables += 1
        if self.tables > MAX_TENSORS + 2:
            raise _TooMany
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key occurs twice")
        return table


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _refuse_pickle(path: Path, start: bytes) -> None:
    zipped, pickled = start.startswith(b"PK"), start[:1] == b"\x80" and 2 <= int.from_bytes(start[1:2], "little") <= 5
    # A safetensors header of exactly 0x..0280 bytes also begins like a pickle; its upper length bytes are zero then.
    if path.suffix.lower() in {".ckpt", ".pt", ".pth", ".bin", ".pkl"} or zipped or (pickled and any(start[4:8])):
        raise OneStepError(
            f"{short(path)} is a pickle, which can run code when it is opened. "
            "Only .safetensors files are read: convert it first."
        )


def _refuse(path: Path, why: str) -> NoReturn:
    raise OneStepError(f"{short(path)} is not a sound .safetensors file: {why}. Download or export it again.")
