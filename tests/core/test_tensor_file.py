"""Safetensors files: only sound ones are read, whatever is broken in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import case, factors, foreign

from onestep.core.errors import OneStepError
from onestep.core.lora_file import load_lora, save_lora
from onestep.core.tensor_file import read_header, read_tensors, write_tensors


def broken_files(tmp_path: Path) -> dict[str, str]:
    """Writes files that are none; their names, with a word that the refusal must hold."""
    _, _, state = case("sd15")
    good = tmp_path / "good.safetensors"
    save_lora(good, state, "unet")
    raw = good.read_bytes()
    torch.save({"a": torch.zeros(2)}, tmp_path / "zipped.safetensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    (tmp_path / "named.ckpt").write_bytes(raw)
    (tmp_path / "cut.safetensors").write_bytes(raw[:-5])
    (tmp_path / "head.safetensors").write_bytes(raw[:100])
    (tmp_path / "longer.safetensors").write_bytes(raw + b"x")
    (tmp_path / "text.safetensors").write_text("<!DOCTYPE html><html>not found</html>")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "huge.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    (tmp_path / "folder").mkdir()
    words = {"zipped": "pickle", "old": "pickle", "cut": "cut off", "head": "cut off", "longer": "left over"}
    words |= {"text": "header", "empty": "0 bytes", "huge": "header"}
    files = {f"{name}.safetensors": word for name, word in words.items()}
    return {**files, "named.ckpt": "pickle", "folder": "Cannot", "none": "Cannot"}


def test_files_that_are_no_sound_safetensors_are_refused(tmp_path: Path) -> None:
    for name, word in broken_files(tmp_path).items():
        for read in (load_lora, read_header):
            with pytest.raises(OneStepError, match=word) as refused:
                read(tmp_path / name)
            assert len(str(refused.value)) < 400


# Forty headers broken at random


def damage(raw: bytes, seed: int) -> bytes:
    """The file with one random harm to its header; each kind of harm five times with its own numbers."""
    pick = lambda n: int(torch.randint(n, (1,), generator=generator))  # noqa: E731
    generator = torch.Generator().manual_seed(seed)
    length = int.from_bytes(raw[:8], "little")
    text, data = raw[8 : 8 + length], raw[8 + length :]

    def whole(header: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header + data

    def edited(edit: Callable[[dict[str, Any], str], None]) -> bytes:
        header = json.loads(text)
        edit(header, list(header)[pick(len(header))])
        return whole(json.dumps(header).encode())

    nonsense = [None, [], "x", -1, 2**70, 1.5, True, {"shape": 1}, [[]], [-1, 2]]
    structure = [i for i, letter in enumerate(text) if letter in b'{}[]:,"']
    kinds: list[Callable[[], bytes]] = [
        lambda: raw[: pick(8 + length)],
        lambda: (length + 1 + pick(2**30)).to_bytes(8, "little") + raw[8:],
        lambda: whole(bytes((spot := bytearray(text)).__setitem__(structure[pick(len(structure))], 0) or spot)),
        lambda: whole(bytes(torch.randint(256, (length,), generator=generator, dtype=torch.uint8).tolist())),
        lambda: edited(lambda header, name: header[name].update(data_offsets=[pick(9), 10**6 + pick(10**6)])),
        lambda: edited(lambda header, name: header[name].update(shape=[*header[name]["shape"], 2 + pick(9)])),
        lambda: edited(lambda header, name: header[name].update(dtype=nonsense[pick(len(nonsense))])),
        lambda: edited(lambda header, name: header.update({name: nonsense[pick(len(nonsense))]})),
    ]
    return kinds[seed % len(kinds)]()


@pytest.mark.parametrize("seed", range(40))
def test_forty_broken_headers_are_refused_and_nothing_else_happens(seed: int, tmp_path: Path) -> None:
    a, b = factors()
    path = foreign(tmp_path / "a.safetensors", {"unet.conv_in.lora_A.weight": a, "unet.conv_in.lora_B.weight": b})
    path.write_bytes(damage(path.read_bytes(), seed))
    for read in (load_lora, read_header):
        with pytest.raises(OneStepError) as refused:
            read(path)
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b'{"__metadata__":{"a":1}}',
        b'{"__metadata__":{"a":"\\ud800"}}',
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
    ],
)
def test_hostile_headers_are_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(OneStepError):
        read_header(path)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]
)
def test_tensors_come_back_as_they_were(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6).reshape(2, 3).to(dtype), "a": torch.ones(()).to(dtype), "none": torch.empty(0, 4)}
    write_tensors(tmp_path / "x.safetensors", tensors, {"note": "ü"})
    found = read_tensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and read_header(tmp_path / "x.safetensors").metadata == {"note": "ü"}
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].double(), tensor.double())
    with open(tmp_path / "x.safetensors", "rb") as file:
        file.seek(0)
        assert int.from_bytes(file.read(8), "little") % 8 == 0


def test_the_order_of_tensors_and_strings_changes_no_byte(tmp_path: Path) -> None:
    one, two = torch.zeros(2), torch.ones(3)
    write_tensors(tmp_path / "x", {"one": one, "two": two}, {"k": "1", "l": "2"})
    write_tensors(tmp_path / "y", {"two": two, "one": one}, {"l": "2", "k": "1"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
