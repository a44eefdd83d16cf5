"""Tiny pipelines as single-file checkpoints, with the configurations that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from single_files import single_file_state
from tiny_pipelines import WIDTH, clip, randomise, sd, sdxl, unet
from torch import Tensor, nn

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def tiny(kind: str) -> Any:
    """A tiny pipeline in the layout of ``kind``."""
    torch.manual_seed(0)
    pipe = sdxl() if kind == "sdxl" else sd()
    if kind == "sdxl":
        # diffusers tells SDXL's encoders apart by their widths
        wide = {"cross_attention_dim": WIDTH + 48, "projection_class_embeddings_input_dim": 48 + 6 * 8}
        pipe.register_modules(text_encoder_2=clip(True, width=48), unet=unet(xl=True, **wide))
    if kind == "sd2":
        pipe.register_modules(unet=unet(use_linear_projection=True))
    for name in PARTS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            randomise(getattr(pipe, name))
    return pipe


def configs_of(pipe: Any, kind: str, folder: Path) -> Path:
    """The pipeline's configurations alone, where the shipped ones of ``kind`` would be."""
    pipe.save_pretrained(folder / kind)
    for file in (folder / kind).rglob("*.safetensors"):
        file.unlink()
    return folder


def checkpoint(kind: str, folder: Path, **more: Tensor) -> tuple[Any, Path, Path]:
    """A tiny pipeline, its single file, and the folder of its configurations."""
    pipe = tiny(kind)
    state = {key: weight.contiguous().clone() for key, weight in single_file_state(pipe.components, kind).items()}
    save_file({**state, **more}, folder / "x.safetensors")
    return pipe, folder / "x.safetensors", configs_of(pipe, kind, folder / "configs")


def changed(file: Path, change: Any, metadata: dict[str, str] | None = None) -> Path:
    """The file with its table of tensors changed."""
    state = load_file(file)
    change(state)
    save_file(state, file, metadata)
    return file
