"""Anima, Lumina 2, PixArt-Sigma, Qwen-Image and Wan for benchmarks/cost.py, in diffusers: networks and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from cost import Case
from torch import Tensor, nn

from onestep.pipelines.padding_mask import without_torchvision

Layout = dict[str, Any]
TOYS: dict[str, Layout] = {
    "anima": {"num_attention_heads": 2, "attention_head_dim": 24, "text_embed_dim": 64, "adaln_lora_dim": 16},
    "lumina2": {
        **{"hidden_size": 96, "num_attention_heads": 6, "num_kv_heads": 2, "multiple_of": 128, "cap_feat_dim": 64},
        **{"axes_dim_rope": (4, 6, 6), "axes_lens": (300, 32, 32)},
    },
    "pixart": {"num_attention_heads": 2, "attention_head_dim": 24, "cross_attention_dim": 48, "caption_channels": 64},
    "qwen": {
        **{"num_attention_heads": 2, "attention_head_dim": 32, "joint_attention_dim": 64},
        "axes_dims_rope": (8, 12, 12),
    },
    "wan": {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 64, "freq_dim": 32, "ffn_dim": 40},
}
WIDTHS = {"anima": 1024, "lumina2": 2304, "pixart": 4096, "qwen": 3584, "wan": 4096}
"""Of a text's tokens."""


def _anima(case: Case, toy: Layout) -> Any:
    without_torchvision()
    wide = {"num_attention_heads": 16, "rope_scale": (1.0, 4.0, 4.0), "extra_pos_embed_type": None}
    return diffusers.CosmosTransformer3DModel(**{**wide, **toy}, num_layers=case.blocks[0])


def _lumina2(case: Case, toy: Layout) -> Any:
    layers, refiners = case.blocks
    wide = {**{"cap_feat_dim": WIDTHS["lumina2"]}, **toy}
    network = diffusers.Lumina2Transformer2DModel(**wide, num_layers=layers, num_refiner_layers=refiners)
    places = network.rope_embedder
    return anew(network, "rope_embedder", places.theta, places.axes_dim, places.axes_lens, places.patch_size)


def _pixart(case: Case, toy: Layout) -> Any:
    wide = {"caption_channels": WIDTHS["pixart"], "use_additional_conditions": False}
    network = diffusers.PixArtTransformer2DModel(**{**wide, **toy}, sample_size=case.side, num_layers=case.blocks[0])
    side, patch = case.side, network.config.patch_size
    return anew(network, "pos_embed", side, side, patch, network.config.in_channels, network.inner_dim)


def _qwen(case: Case, toy: Layout) -> Any:
    network = diffusers.QwenImageTransformer2DModel(**toy, num_layers=case.blocks[0])
    return anew(network, "pos_embed", 10000, network.pos_embed.axes_dim, True)


def _wan(case: Case, toy: Layout) -> Any:
    """Wan 2.1's of 1.3 B."""
    wide = {"num_attention_heads": 12, "ffn_dim": 8960}
    network = diffusers.WanTransformer3DModel(**{**wide, **toy}, num_layers=case.blocks[0])
    places = network.rope
    return anew(network, "rope", places.attention_head_dim, places.patch_size, places.max_seq_len)


def anew(network: Any, name: str, *given: Any) -> Any:
    """``network``, whose module of this name is made where it has numbers: some of them are in no file."""
    with torch.device("cpu"):
        setattr(network, name, type(getattr(network, name))(*given))
    return network


MAKERS: dict[str, Callable[[Case, Layout], nn.Module]] = {
    "anima": _anima,
    "lumina2": _lumina2,
    "pixart": _pixart,
    "qwen": _qwen,
    "wan": _wan,
}


def inputs_of(case: Case, device: torch.device, draw: Callable[..., Tensor]) -> Layout:
    """Arguments of the network's forward, for one picture; of a video's network it is the one frame."""
    side, family = case.side, case.family
    width = WIDTHS[family] if case.wide else 64
    told: Layout = {"encoder_hidden_states": draw(1, case.tokens, width), "return_dict": False}
    told["timestep"] = torch.tensor([700.0 if family in ("pixart", "wan") else 0.7], device=device)
    shapes = {"lumina2": (16, side, side), "pixart": (4, side, side), "qwen": ((side // 2) ** 2, 64)}
    told["hidden_states"] = draw(1, *shapes.get(family, (16, 1, side, side)))
    if family == "anima":
        told["padding_mask"] = torch.zeros(1, 1, side, side, device=device, dtype=told["hidden_states"].dtype)
    if family == "lumina2":
        told["encoder_attention_mask"] = torch.tensor([[True] * case.tokens], device=device)
    if family == "qwen":
        told["img_shapes"] = [[(1, side // 2, side // 2)]]
    return told
