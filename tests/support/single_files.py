"""Single-file checkpoints in the layouts of the original Stable Diffusion code, from diffusers' modules.

The inverse of what diffusers' from_single_file does, written from the original layouts; works on meta tensors too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTER = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
    "conv_out": "out.2",
}  # fmt: skip


def unet_keys(unet: Any) -> State:
    layers = unet.config.layers_per_block
    found = {}
    for name, weight in unet.state_dict().items():
        path, kind = name.rsplit(".", 1)
        found[f"model.diffusion_model.{_unet_path(path, layers)}.{kind}"] = weight
    return found


def _unet_path(path: str, layers: int) -> str:
    if path in OUTER:
        return OUTER[path]
    if hit := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", path):
        at = 2 * int(hit[2]) if hit[1] == "resnets" else 1
        return f"middle_block.{at}.{RESNET.get(hit[3], hit[3])}"
    if hit := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv", path):
        return f"input_blocks.{(layers + 1) * (int(hit[1]) + 1)}.0.op"
    if hit := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv", path):
        return f"output_blocks.{(layers + 1) * int(hit[1]) + layers}.UP.conv"
    hit = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", path)
    assert hit, path
    side = "input_blocks" if hit[1] == "down" else "output_blocks"
    at = (layers + 1) * int(hit[2]) + int(hit[4]) + (hit[1] == "down")
    return f"{side}.{at}.{int(hit[3] == 'attentions')}.{RESNET.get(hit[5], hit[5])}"


def place_upsamplers(state: State) -> State:
    """An upsampling follows the attention of its block, where there is one."""
    placed = {}
    for key, weight in state.items():
        if ".UP." in key:
            block = key.split(".UP.")[0]
            key = key.replace(".UP.", f".{2 if any(other.startswith(block + '.1.') for other in state) else 1}.")
        placed[key] = weight
    return placed


def vae_keys(vae: Any) -> State:
    levels = len(vae.config.block_out_channels)
    found = {}
    for name, weight in vae.state_dict().items():
        path = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        path = path.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        path = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", path)
        path = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", path)
        path = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", path)
        path = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", path)
        path = path.replace("conv_shortcut", "nin_shortcut")
        if ".attn_1." in path:
            for theirs, original in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v")):
                path = path.replace(f".{theirs}.", f".{original}.")
            path = path.replace("to_out.0", "proj_out")
            weight = weight[:, :, None, None] if weight.ndim == 2 else weight
        found[f"first_stage_model.{path}"] = weight
    return found


def clip_keys(encoder: Any, prefix: str) -> State:
    """OpenAI's CLIP as transformers names it, under its older root."""
    return {f"{prefix}text_model.{_bare(key)}": weight for key, weight in encoder.state_dict().items()}


def open_clip_keys(encoder: Any, prefix: str) -> State:
    state = {_bare(key): weight for key, weight in encoder.state_dict().items()}
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": torch.zeros(()),
    }
    if "text_projection.weight" in state:
        found["text_projection"] = state["text_projection.weight"].T
    names = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for layer in range(encoder.config.num_hidden_layers):
        old, new = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            fused = [state[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{new}attn.in_proj_{kind}"] = torch.cat(fused)
            for theirs, original in names.items():
                found[f"{new}{original}.{kind}"] = state[f"{old}{theirs}.{kind}"]
    return {prefix + key: weight for key, weight in found.items()}


def _bare(key: str) -> str:
    """transformers 5 has no `text_model` in a CLIPTextModel, transformers 4 has."""
    return key.removeprefix("text_model.")


Encoders = Mapping[str, tuple[Callable[[Any, str], State], str]]
LAYOUTS: dict[str, Encoders] = {
    "sd15": {"text_encoder": (clip_keys, "cond_stage_model.transformer.")},
    "sd2": {"text_encoder": (open_clip_keys, "cond_stage_model.model.")},
    "sdxl": {
        "text_encoder": (clip_keys, "conditioner.embedders.0.transformer."),
        "text_encoder_2": (open_clip_keys, "conditioner.embedders.1.model."),
    },
}


def single_file_state(parts: Mapping[str, Any], layout: str) -> State:
    """All tensors of a checkpoint of ``layout`` from the modules "unet", "vae", "text_encoder" ..."""
    state = {**place_upsamplers(unet_keys(parts["unet"])), **vae_keys(parts["vae"])}
    for name, (keys, prefix) in LAYOUTS[layout].items():
        state |= keys(parts[name], prefix)
    return state


def write_sparse(path: Path, state: Mapping[str, Tensor], dtype: str = "F16", bytes_each: int = 2) -> None:
    """A safetensors file of zeros in these shapes, which takes no space on the disk."""
    entries, at = {}, 0
    for name, tensor in state.items():
        size = tensor.numel() * bytes_each
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + at)
