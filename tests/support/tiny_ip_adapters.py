"""Tiny IP-Adapters of every family with random weights, in the layout of their published files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from safetensors.torch import save_file
from tiny_pipelines import randomise
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

EMBED = 12  # width of an image's embedding
TOKENS = 4


def unet_state(unet: Any, seed: int = 5) -> dict[str, dict[str, Tensor]]:
    """image_proj and ip_adapter of a U-Net: cross-attentions are numbered 1, 3, 5, ..."""
    draw = torch.Generator().manual_seed(seed)
    crossed = [
        name for name in unet.attn_processors if unet.get_submodule(name.removesuffix(".processor")).is_cross_attention
    ]
    width = unet.config.cross_attention_dim
    layers: dict[str, Tensor] = {}
    for number, name in enumerate(crossed):
        inner = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for part in ("k", "v"):
            layers[f"{2 * number + 1}.to_{part}_ip.weight"] = torch.randn(inner, width, generator=draw) * width**-0.5
    return {"image_proj": _projection(width, draw), "ip_adapter": layers}


def flux_state(transformer: Any, seed: int = 5) -> dict[str, dict[str, Tensor]]:
    draw, width = torch.Generator().manual_seed(seed), transformer.config.joint_attention_dim
    layers: dict[str, Tensor] = {}
    for number in range(transformer.config.num_layers):
        for part in ("k", "v"):
            layers[f"{number}.to_{part}_ip.weight"] = torch.randn(transformer.inner_dim, width, generator=draw) * 0.2
            layers[f"{number}.to_{part}_ip.bias"] = torch.zeros(transformer.inner_dim)
    return {"image_proj": _projection(width, draw), "ip_adapter": layers}


def give_sd3(transformer: Any) -> None:
    """SD3's, put in place as its loader does."""
    torch.manual_seed(5)
    inner = transformer.config.attention_head_dim * transformer.config.num_attention_heads
    transformer.image_proj = IPAdapterTimeImageProjection(EMBED, inner, 16, 1, 8, 2, TOKENS, 2, 16)
    processors = {
        name: SD3IPAdapterJointAttnProcessor2_0(inner, inner, transformer.config.attention_head_dim, 16)
        for name in transformer.attn_processors
    }
    transformer.set_attn_processor(processors)
    for module in (transformer.image_proj, *processors.values()):
        randomise(module)


def give(pipe: Any, kind: str) -> None:
    """An adapter for the embeddings of `image_embeds`, at scale 1."""
    if kind == "sd3":
        give_sd3(pipe.transformer)
    elif kind == "flux":
        pipe.transformer._load_ip_adapter_weights([flux_state(pipe.transformer)], low_cpu_mem_usage=False)
    else:
        pipe.unet._load_ip_adapter_weights([unet_state(pipe.unet)], low_cpu_mem_usage=False)


def image_embeds(kind: str, rows: int = 1, seed: int = 9) -> Any:
    """As the family's prepare_ip_adapter_image_embeds returns them."""
    found = torch.randn(rows, 1, EMBED, generator=torch.Generator().manual_seed(seed))
    return found if kind == "sd3" else [found]


def image_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(3)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=EMBED, **shape)
    )
    return encoder.eval()


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def saved(folder: Path, pipe: Any) -> str:
    """A folder as published: models/ip.safetensors, and the image encoder beside; the file's name."""
    state = {f"{part}.{key}": value for part, table in unet_state(pipe.unet).items() for key, value in table.items()}
    (folder / "models").mkdir(parents=True)
    save_file(state, folder / "models" / "ip.safetensors")
    image_encoder().save_pretrained(folder / "models" / "image_encoder")
    return "ip.safetensors"


def _projection(width: int, draw: torch.Generator) -> dict[str, Tensor]:
    return {
        "proj.weight": torch.randn(TOKENS * width, EMBED, generator=draw) * EMBED**-0.5,
        "proj.bias": torch.zeros(TOKENS * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
