"""Files of sides: they give back what was written, and whatever is wrong with one is said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_adapters import Shift, Width

from onestep.core.adapter_file import KEY, check_adapter, load_adapter, save_adapter
from onestep.core.errors import OneStepError
from onestep.core.tensor_file import read_header, read_tensors, write_tensors

MAKERS = {"shift": Shift.from_config}


def made() -> Shift:
    side = Shift(Width(8))
    with torch.no_grad():
        side.by.copy_(torch.arange(8) / 7)
        side.scale.mul_(3)
    return side


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "x.safetensors", made(), "unet", {"note": "ü"})
    return tmp_path / "x.safetensors"


def test_a_file_gives_back_parameters_buffers_and_words(file: Path) -> None:
    found = load_adapter(file, MAKERS, "unet")
    assert (found.kind, found.family, found.metadata) == ("shift", "unet", {"note": "ü"})
    assert torch.equal(found.module.by, made().by) and torch.equal(found.module.scale, made().scale)
    assert found.module.config == Width(8) and found.module.after == made().after
    assert check_adapter(file, made(), "unet") == "the adapter reads back: 2 tensors on 1 layers, bit for bit"
    with pytest.raises(OneStepError, match="does not give back.*by"):
        check_adapter(file, Shift(Width(8)), "unet")


def test_the_same_side_makes_the_same_bytes(file: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "y.safetensors", made(), "unet", {"note": "ü"})
    assert (tmp_path / "y.safetensors").read_bytes() == file.read_bytes()


def rewritten(file: Path, tensors: dict[str, Any] | None = None, **told: Any) -> Path:
    header = json.loads(read_header(file).metadata[KEY]) | told
    write_tensors(file, tensors or read_tensors(file), {KEY: json.dumps(header)})
    return file


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"kind": "gate"}, "kind 'gate', not 'shift'"),
        ({"family": "sd3"}, "made for 'sd3' models, this one is 'unet'"),
        ({"version": 2}, "version 2, known is 1"),
        ({"version": "1"}, "version '1'"),
        ({"config": {"height": 8}}, "config makes no adapter"),
        ({"config": {"width": "wide"}}, "config makes no adapter"),
        ({"config": {"width": -3}}, "config makes no adapter"),
        ({"config": {"width": 4}}, "2 tensors do not fit its config, 'by' the first"),
        ({"config": []}, "of version"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(file: Path, told: dict[str, Any], words: str) -> None:
    with pytest.raises(OneStepError, match=words) as caught:
        load_adapter(rewritten(file, **told), MAKERS, "unet")
    assert len(str(caught.value)) < 400


def test_numbers_that_are_none_are_refused(file: Path) -> None:
    tensors = read_tensors(file)
    tensors["by"][3] = torch.nan
    with pytest.raises(OneStepError, match="'by' holds numbers that are not finite"):
        load_adapter(rewritten(file, tensors), MAKERS)


def test_other_files_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "lora.safetensors", {"a": torch.zeros(2)}, {"ss_steps": "3"})
    with pytest.raises(OneStepError, match="no adapter of this package: a LoRA goes through a LoRA loader"):
        load_adapter(tmp_path / "lora.safetensors", MAKERS)
    for text in ("{", "[]", '{"version": 1}', '"x"', "[" * 100_000):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)}, {KEY: text})
        with pytest.raises(OneStepError, match="header is damaged"):
            load_adapter(tmp_path / "x.safetensors", MAKERS)
    with pytest.raises(OneStepError, match="Cannot read"):
        load_adapter(tmp_path / "absent.safetensors", MAKERS)
