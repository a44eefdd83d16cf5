"""Read a diffusers-layout folder without diffusers: JSON configurations and safetensors weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ...core.errors import OneStepError

Config = dict[str, Any]
Weights = dict[str, torch.Tensor]
CONFIGS = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
BIGGEST_CONFIG_BYTES = 1 << 20


def has_part(folder: Path, part: str) -> bool:
    return (folder / part).is_dir()


def read_config(folder: Path, part: str) -> Config:
    """The configuration of one part ("unet", "vae", "scheduler", ...)."""
    file = folder / part / CONFIGS.get(part, "config.json")
    if not file.is_file() or file.stat().st_size > BIGGEST_CONFIG_BYTES:
        raise OneStepError(
            f"{file} is missing or too long to be a configuration: install the pack again, its "
            f"tiny models are incomplete"
        )
    config: Config = json.loads(file.read_text(encoding="utf-8"))
    return config


def read_weights(folder: Path, part: str) -> Weights:
    """All weights of one part in float32, under their diffusers names."""
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        if (file := folder / part / name).is_file():
            return {key: tensor.float() for key, tensor in load_file(file).items()}
    raise OneStepError(
        f"no safetensors weights in {folder / part}: install the pack again, its tiny models are incomplete"
    )


def require(part: str, config: Config, wanted: Config) -> None:
    """Refuse a configuration that ComfyUI's class cannot express; an absent entry has the wanted (default) value."""
    for key, value in wanted.items():
        if (found := config.get(key, value)) != value:
            raise OneStepError(
                f"{part} has {key} = {found!r}; ComfyUI's own class draws the same picture only with {value!r}"
            )
