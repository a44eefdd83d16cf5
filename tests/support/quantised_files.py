"""Write a tiny checkpoint again with its network's weights stored in another way. Runs in ComfyUI's Python.

    quantised_files.py CHECKPOINT FOLDER KIND...    ->    FOLDER/<stem>_<kind>.safetensors, and <stem>_<kind>_twin

A twin holds the numbers that the stored weights stand for, in float32. Kinds: fp8 and e5m2 (every number as it is),
scaled and scaled-input (keys of ComfyUI's older scaled fp8), and the formats of comfy-kitchen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from comfy.quant_ops import QuantizedTensor
from safetensors.torch import load_file, save_file

NETWORK = "model.diffusion_model."
ROTATED = {"convrot": True, "convrot_groupsize": 64}
KITCHEN: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # kind: format, layout, how it is quantised, what its mark says beside the format
    "kitchen-fp8": ("float8_e4m3fn", "TensorCoreFP8E4M3Layout", {"scale": "recalculate"}, {}),
    "kitchen-e5m2": ("float8_e5m2", "TensorCoreFP8E5M2Layout", {"scale": "recalculate"}, {}),
    "int8": ("int8_tensorwise", "TensorWiseINT8Layout", {}, {}),
    "int8-rows": ("int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True}, {}),
    "int8-rotated": ("int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True, **ROTATED}, ROTATED),
    "nvfp4": ("nvfp4", "TensorCoreNVFP4Layout", {}, {}),
    "mxfp8": ("mxfp8", "TensorCoreMXFP8Layout", {}, {}),
    "w4a4": ("convrot_w4a4", "TensorCoreConvRotW4A4Layout", {"convrot_groupsize": 64}, {"convrot_groupsize": 64}),
    "w4a8": ("asym_w4a8_int8", "AsymW4A8Int8Layout", {"convrot_groupsize": 64}, {"convrot_groupsize": 64}),
}
PLAIN = {"fp8": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
FIRST = (
    "img_in.",
    "x_embedder.",
    "context_embedder.",
    "txt_in.",
    "first.",
    "txtfusion.projector.",
    "last.",
    "time",
    "vector_in",
    "final_layer.",
)
"""Layers by which ComfyUI knows a network, and such as published files leave as they are."""


def is_stored(key: str, weight: torch.Tensor) -> bool:
    """Whether published files quantise it: a linear layer's weight inside the network."""
    if not key.startswith(NETWORK) or not key.endswith(".weight") or weight.ndim != 2:
        return False
    return not key.removeprefix(NETWORK).startswith(FIRST) and not any(size % 64 for size in weight.shape)


def kitchen(key: str, weight: torch.Tensor, kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The keys of one layer, and the numbers that they stand for."""
    name, layout, how, told = KITCHEN[kind]
    stored = QuantizedTensor.from_float(weight.float(), layout, **how)
    mark = torch.tensor(list(json.dumps({"format": name, **told}).encode()), dtype=torch.uint8)
    return {**stored.state_dict(key), key.removesuffix("weight") + "comfy_quant": mark}, stored.dequantize()


def scaled(key: str, weight: torch.Tensor, kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scale = weight.float().abs().max() / 448
    stored = (weight.float() / scale).to(torch.float8_e4m3fn)
    found = {key: stored, key.removesuffix("weight") + "scale_weight": scale}
    if kind == "scaled-input":
        found[key.removesuffix("weight") + "scale_input"] = torch.tensor(0.02)
    return found, stored.float() * scale


def stored(state: dict[str, torch.Tensor], kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The whole file's tensors, and its twin's."""
    found, twin = {}, {}
    for key, weight in state.items():
        if kind in PLAIN:
            inside = key.startswith(NETWORK)
            found[key] = weight.to(PLAIN[kind]) if inside else weight
            twin[key] = found[key].float() if inside else weight
        elif is_stored(key, weight):
            keys, numbers = (scaled if kind.startswith("scaled") else kitchen)(key, weight, kind)
            found |= keys
            twin[key] = numbers
        else:
            found[key] = twin[key] = weight
    if kind.startswith("scaled"):
        found[NETWORK + "scaled_fp8"] = torch.zeros(0 if kind == "scaled-input" else 2).to(torch.float8_e4m3fn)
    return found, twin


if __name__ == "__main__":
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    for kind in sys.argv[3:]:
        for name, tensors in zip((kind, f"{kind}_twin"), stored(load_file(source), kind), strict=True):
            whole = {key: value.contiguous().clone() for key, value in tensors.items()}
            save_file(whole, folder / f"{source.stem}_{name}.safetensors")
