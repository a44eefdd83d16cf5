"""Folders whose parts lie in variants and shards: each part from its own best whole files, exactly, or a word."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import make, sd3

from onestep.core.errors import OneStepError
from onestep.pipelines.load import load
from onestep.pipelines.weights import best_variant, variants

PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def as_variant(folder: Path, variant: str, *parts: str) -> None:
    for file in folder.glob("*/*.safetensors"):
        if file.parent.name in parts:
            file.rename(file.with_name(file.name.replace(".safetensors", f".{variant}.safetensors")))


def sharded(pipe: Any, folder: Path, variant: str | None, *parts: str) -> None:
    for part in parts:
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
        getattr(pipe, part).save_pretrained(folder / part, max_shard_size="4KB", variant=variant)
        assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1


def older_shards(folder: Path, part: str, variant: str) -> None:
    """The variant behind the shard's number, as diffusers once wrote it."""
    for file in (folder / part).glob(f"*.{variant}-*"):
        file.rename(file.with_name(re.sub(rf"\.{variant}(-\d+-of-\d+)", rf"\1.{variant}", file.name)))
    index = next((folder / part).glob(f"*.index.{variant}.json"))
    index.write_text(re.sub(rf"\.{variant}(-\d+-of-\d+)", rf"\1.{variant}", index.read_text()))


CASES: dict[str, tuple[str, Callable[[Any, Path], Any]]] = {
    "a plain U-Net, the VAE in fp16": ("sd", lambda p, f: as_variant(f, "fp16", "vae")),
    "all but the U-Net in bf16": ("sdxl", lambda p, f: as_variant(f, "bf16", "vae", "text_encoder", "text_encoder_2")),
    "another variant for each part": (
        "sdxl",
        lambda p, f: [as_variant(f, v, n) for v, n in (("fp16", "unet"), ("non_ema", "vae"), ("bf16", "text_encoder"))],
    ),
    "EMA weights alone": ("sd", lambda p, f: as_variant(f, "ema", "unet")),
    "a variant of one's own": ("flux", lambda p, f: as_variant(f, "my-run_2", "transformer")),
    "shards of a variant": ("sd3", lambda p, f: sharded(p, f, "fp16", "transformer")),
    "shards of an encoder's variant": ("flux", lambda p, f: sharded(p, f, "fp16", "text_encoder_2")),
    "plain shards beside a variant": (
        "sdxl",
        lambda p, f: [sharded(p, f, None, "unet"), as_variant(f, "fp16", "text_encoder_2")],
    ),
    "older names of shards": ("sd", lambda p, f: [sharded(p, f, "fp16", "unet"), older_shards(f, "unet", "fp16")]),
    "no feature extractor where the index has one": (
        "sd",
        lambda p, f: _index(f, feature_extractor=["transformers", "CLIPImageProcessor"]),
    ),
}


def _index(folder: Path, **entries: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("case", CASES)
def test_each_part_is_found(case: str, tmp_path: Path) -> None:
    name, change = CASES[case]
    pipe = make(name)
    pipe.save_pretrained(tmp_path / "model")
    change(pipe, tmp_path / "model")
    loaded = load(tmp_path / "model")
    for part in PARTS:
        if getattr(pipe, part, None) is not None:
            theirs = getattr(pipe, part).state_dict()
            ours = getattr(loaded, part).state_dict()
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), part


def test_the_best_variant_is_taken(tmp_path: Path) -> None:
    stem = "diffusion_pytorch_model"

    def there(*names: str) -> Path:
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            save_file({"x": torch.zeros(1)}, folder / f"{stem}{name}.safetensors")
        return folder

    assert best_variant(there(".fp16", "", ".bf16"), stem, torch.bfloat16) == ""
    assert best_variant(there(".fp16", ".bf16"), stem, torch.bfloat16) == "bf16"
    assert best_variant(there(".bf16", ".fp16", ".non_ema"), stem, torch.float16) == "fp16"
    assert best_variant(there(".fp32", ".fp16"), stem, torch.float32) == "fp32"
    assert best_variant(there(".non_ema", ".ema"), stem, torch.float32) == "ema"
    # shards without their index are not whole
    assert best_variant(there("-00001-of-00002", ".bf16"), stem, torch.float32) == "bf16"
    assert variants(there(".fp16-00001-of-00002", "-00002-of-00003.fp16", "x"), stem).keys() == {"fp16"}


def drop(folder: Path, part: str, name: str) -> None:
    for file in (folder / part).glob("*.safetensors"):
        state = load_file(file)
        state.pop(name, None)
        save_file(state, file, {"format": "pt"})


def remove(folder: Path, pattern: str) -> None:
    next(iter(sorted(folder.glob(pattern)))).unlink()


REFUSED: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "a tensor of the U-Net": (
        lambda p, f: drop(f, "unet", "conv_out.bias"),
        "model/unet is incomplete.*lack conv_out.bias",
    ),
    "a tensor of the encoder": (
        lambda p, f: drop(f, "text_encoder", next(k for k in p.text_encoder.state_dict() if "final_layer" in k)),
        "model/text_encoder is incomplete.*final_layer_norm",
    ),
    "a shard": (
        lambda p, f: [sharded(p, f, "fp16", "unet"), remove(f, "unet/*-00001-of-*")],
        r"model/unet is incomplete: its fp16 weights lack the file .*-00001-of-\d+.safetensors",
    ),
    "the shards' index": (
        lambda p, f: [sharded(p, f, None, "unet"), remove(f, "unet/*.index.json")],
        "its plain weights lack the file diffusion_pytorch_model.safetensors.index.json",
    ),
    "all weights of a part": (lambda p, f: remove(f, "vae/*.safetensors"), "model/vae holds no weights"),
    "a part's folder": (
        lambda p, f: [remove(f, "vae/*"), remove(f, "vae/*"), (f / "vae").rmdir()],
        "model/vae holds no weights",
    ),
    "a class of another library": (
        lambda p, f: _index(f, vae=["os", "path"]),
        r"vae is \['os', 'path'\], .*not known",
    ),
    "a class that is no module": (
        lambda p, f: _index(f, unet=["diffusers", "DDIMScheduler"]),
        "unet is .*DDIMScheduler.*not known",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_is_named(case: str, tmp_path: Path) -> None:
    change, why = REFUSED[case]
    pipe = make("sd")
    pipe.save_pretrained(tmp_path / "model")
    change(pipe, tmp_path / "model")
    with pytest.raises(OneStepError, match=why) as caught:
        load(tmp_path / "model")
    assert len(str(caught.value)) < 400


def test_sd3_whose_t5_was_not_downloaded_draws_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sd3(with_t5=True).save_pretrained(tmp_path / "model")
    remove(tmp_path / "model", "text_encoder_3/*.safetensors")
    with caplog.at_level(logging.WARNING):
        loaded = load(tmp_path / "model")
    assert loaded.text_encoder_3 is None and loaded.tokenizer_3 is None
    assert any("T5" in line for line in caplog.messages)
