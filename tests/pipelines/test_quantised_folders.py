"""Diffusers folders whose weights are quantised, or look so: what would be read without its scales is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import make
from torch import Tensor

from onestep.core.errors import OneStepError
from onestep.pipelines.load import load

LAYER = {
    "unet": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "transformer": "transformer_blocks.0.attn.to_q",
    "text_encoder": "encoder.layers.0.mlp.fc1",
}
FILES = {"unet": "diffusion_pytorch_model", "transformer": "diffusion_pytorch_model", "text_encoder": "model"}
State = dict[str, Tensor]
Change = Callable[[State, str], Any]


def scaled(name: str) -> Change:
    """fp8, and its scale under ``name``."""

    def change(state: State, layer: str) -> None:
        scale = state[f"{layer}.weight"].abs().max() / 448
        state |= {f"{layer}.weight": (state[f"{layer}.weight"] / scale).to(torch.float8_e4m3fn)}
        state |= {f"{layer}.{name}": scale}

    return change


def with_key(name: str, value: Tensor) -> Change:
    return lambda state, layer: state.update({f"{layer}.{name}": value})


def packed(state: State, layer: str) -> None:
    """As bitsandbytes packs four bits."""
    weight = state[f"{layer}.weight"]
    state[f"{layer}.weight"] = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    state |= {f"{layer}.weight.absmax": torch.ones(4), f"{layer}.weight.quant_map": torch.zeros(16)}


MARK = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
QUANTISED: dict[str, tuple[str, str, Change, str]] = {
    "scale_weight": ("sd", "unet", scaled("scale_weight"), "to_q.scale_weight: its weights are quantised"),
    "weight_scale": ("sd3", "transformer", scaled("weight_scale"), "to_q.weight_scale: its weights are quantised"),
    "of Flux": ("flux", "transformer", scaled("weight_scale"), "to_q.weight_scale: its weights are quantised"),
    "an encoder": ("sd", "text_encoder", scaled("scale_weight"), "fc1.scale_weight: its weights are quantised"),
    "inputs": ("sd", "unet", with_key("input_scale", torch.ones(())), "to_q.input_scale: its weights are quantised"),
    "a mark": ("sd", "unet", with_key("comfy_quant", MARK), "to_q.comfy_quant: its weights are quantised"),
    "a root": ("sd", "unet", lambda state, layer: state.update(scaled_fp8=torch.zeros(2)), "holds scaled_fp8"),
    "scales of scales": ("sd", "unet", with_key("weight_scale_2", torch.ones(())), "its weights are quantised"),
    "GPTQ": ("sd", "unet", with_key("qweight", torch.zeros(4, 4, dtype=torch.int32)), "its weights are quantised"),
    "a smoothed input": ("sd3", "transformer", with_key("pre_quant_scale", torch.ones(4)), "its weights are quantised"),
}
BROKEN: dict[str, tuple[str, str, Change, str]] = {
    "four bits": ("sd", "unet", packed, "model/unet holds .*to_q.weight as torch.uint8: its weights are quantised"),
    "an encoder in whole numbers": (
        "sd",
        "text_encoder",
        lambda state, layer: state.update({f"{layer}.weight": state[f"{layer}.weight"].to(torch.int8)}),
        "text_encoder holds .*fc1.weight as torch.int8: its weights are quantised",
    ),
    "NaN in fp8": (
        "sd",
        "unet",
        lambda state, layer: state.update({f"{layer}.weight": nan_in_float8(state[f"{layer}.weight"])}),
        "to_q.weight holds numbers that are not finite",
    ),
    "whole numbers": (
        "sd",
        "unet",
        lambda state, layer: state.update({f"{layer}.weight": state[f"{layer}.weight"].to(torch.int8)}),
        "unet holds .*to_q.weight as torch.int8: its weights are quantised",
    ),
}


def nan_in_float8(weight: Tensor) -> Tensor:
    stored = weight.to(torch.float8_e4m3fn)
    stored.view(torch.uint8).view(-1)[3] = 0x7F
    return stored


def folder(case: tuple[str, str, Change, str], place: Path, shards: bool = False) -> Path:
    name, part, change, _ = case
    pipe = make(name)
    pipe.save_pretrained(place / "model")
    file = place / "model" / part / f"{FILES[part]}.safetensors"
    state = load_file(file)
    layer = next(key for key in state if key.endswith(f"{LAYER[part]}.weight")).removesuffix(".weight")
    change(state, layer)
    if shards:
        file.unlink()
        halves = {1: sorted(state)[::2], 2: sorted(state)[1::2]}
        names = {number: f"{FILES[part]}-0000{number}-of-00002.safetensors" for number in halves}
        for number, keys in halves.items():
            save_file({key: state[key] for key in keys}, file.with_name(names[number]), {"format": "pt"})
        index = {key: names[number] for number, keys in halves.items() for key in keys}
        told = {"metadata": {}, "weight_map": index}
        file.with_name(f"{FILES[part]}.safetensors.index.json").write_text(json.dumps(told))
    else:
        save_file(state, file, {"format": "pt"})
    return place / "model"


@pytest.mark.parametrize("case", QUANTISED)
def test_weights_with_scales_are_refused_by_name(case: str, tmp_path: Path) -> None:
    part, why = QUANTISED[case][1], QUANTISED[case][3]
    with pytest.raises(OneStepError, match=why) as caught:
        load(folder(QUANTISED[case], tmp_path))
    said = str(caught.value)
    assert f"model/{part} holds" in said and "or a single file in scaled fp8" in said and len(said) < 400


def test_in_shards_too(tmp_path: Path) -> None:
    with pytest.raises(OneStepError, match=r"to_q.scale_weight: its weights are quantised"):
        load(folder(QUANTISED["scale_weight"], tmp_path, shards=True))


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_or_packed_is_refused_in_words(case: str, tmp_path: Path) -> None:
    with pytest.raises(OneStepError, match=BROKEN[case][3]) as caught:
        load(folder(BROKEN[case], tmp_path))
    assert len(str(caught.value)) < 400


def test_a_folder_that_says_how_it_was_quantised_is_no_plain_one(tmp_path: Path) -> None:
    """Its configuration names a quantiser that is not known here."""
    place = folder(("sd", "unet", lambda state, layer: None, ""), tmp_path)
    config = place / "unet" / "config.json"
    told = {"quantization_config": {"quant_method": "svdquant", "precision": "int4"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | told))
    with pytest.raises(OneStepError, match="svdquant") as caught:
        load(place)
    assert len(str(caught.value)) < 400


def test_what_is_no_weight_may_be_of_whole_numbers(tmp_path: Path) -> None:
    """Positions, which older files of encoders hold."""
    change = lambda state, layer: state.update({"text_model.embeddings.position_ids": torch.arange(77)[None]})  # noqa: E731
    pipe = load(folder(("sd", "text_encoder", change, ""), tmp_path))
    assert pipe.text_encoder.dtype == torch.float32
