"""Krea 2's pipeline with random weights, a few channels wide: diffusers' classes with a Qwen3-VL as their text encoder,
three of whose layers are the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from safetensors.torch import load_file, save_file
from tiny_folders import shaken
from tiny_qwen import tokenizer
from transformers import Qwen3VLConfig, Qwen3VLModel

from onestep.core.families import FAMILIES
from onestep.core.families.krea2 import layout_of_canonical

PUBLISHED: dict[str, Any] = {
    **{"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 6400, "max_shift": 1.15},
    "use_dynamic_shifting": True,
}
"""What its pipeline asks of a scheduler's configuration."""
TAPS = (1, 2, 4)
"""Layers of the encoder whose inputs are a token."""
SMALL: dict[str, Any] = {
    **{"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 256, "timestep_embed_dim": 32, "axes_dims_rope": (4, 6, 6), "text_hidden_dim": 8},
    **{"text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 128},
}
OWN: dict[str, Any] = {
    **{"num_layers": 1, "attention_head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"intermediate_size": 768, "text_hidden_dim": 40, "text_intermediate_size": 128},
}
"""What ComfyUI's own loader knows at this size: heads of 128, twenty of the text's."""


def encoder(vocabulary: int, width: int = 8, head: int = 128) -> Qwen3VLModel:
    """ComfyUI's heads are 128 wide. Its eyes are as small as can be: no picture is shown to it."""
    half = head // 2
    sections = [half - 2 * (half * 5 // 16), half * 5 // 16, half * 5 // 16]
    rope = {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": sections, "mrope_interleaved": True}
    text = {
        **{"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 5},
        **{"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": head, "max_position_embeddings": 1024},
        **{"rms_norm_eps": 1e-6, "pad_token_id": 256, "rope_parameters": rope},
    }
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": width}
    config = Qwen3VLConfig(
        text_config=text,
        vision_config={**eyes, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **{f"{kind}_id": 257 for kind in ("image_token", "video_token", "vision_start_token", "vision_end_token")},
    )
    return Qwen3VLModel(config)


def krea2(
    vae: Any, *, head: int = 128, distilled: bool = False, sizes: dict[str, Any] = SMALL, **scheduler: Any
) -> Krea2Pipeline:
    """head: of the text encoder's. sizes: of the transformer."""
    words = tokenizer()
    return Krea2Pipeline(
        **{"scheduler": FlowMatchEulerDiscreteScheduler(**PUBLISHED | scheduler), "vae": vae, "tokenizer": words},
        transformer=Krea2Transformer2DModel(num_text_layers=len(TAPS), **sizes),
        text_encoder=encoder(len(words), sizes["text_hidden_dim"], head),
        **{"text_encoder_select_layers": TAPS, "is_distilled": distilled},
    )


def krea2_folder(folder: Path, vae: Any, **told: Any) -> Path:
    """Krea2Pipeline's layout, with weights of none at its special start."""
    torch.manual_seed(1)
    pipe = krea2(vae, **told)
    shaken(pipe.transformer, 3)
    shaken(pipe.text_encoder, 4)
    pipe.save_pretrained(folder)
    return folder


def own_checkpoint(folder: Path, path: Path) -> Path:
    """The folder's transformer as people have it for ComfyUI, a file by its names."""
    weights, told = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"), {}
    rows = FAMILIES["krea2"].rows(layout_of_canonical(weights))
    names = {row.names[0]: row.host for row in rows}
    blocks = {ours.removesuffix(".attn.to_q"): theirs.removesuffix(".attn.wq") for ours, theirs in names.items()}
    for key, value in weights.items():
        layer, _, kind = key.rpartition(".")
        if layer in names:
            told[f"{names[layer]}.{kind}"] = value
        elif kind == "scale_shift_table":
            told["last.modulation.lin" if layer == "final_layer" else f"{blocks[layer]}.mod.lin"] = value
        else:
            told[OF_NORMS.get(layer) or _norm(layer, blocks)] = value
    told |= {key: value.flatten() for key, value in told.items() if key.endswith("mod.lin")}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in told.items()}, path)
    return path


OF_NORMS = {"txt_in.norm": "txtmlp.0.scale", "final_layer.norm": "last.norm.scale"}
INSIDE = {"norm1": "prenorm", "norm2": "postnorm", "attn.norm_q": "attn.qknorm.qnorm"}
INSIDE["attn.norm_k"] = "attn.qknorm.knorm"


def _norm(layer: str, blocks: dict[str, str]) -> str:
    block, inside = next((name, layer[len(name) + 1 :]) for name in blocks if layer.startswith(f"{name}."))
    return f"{blocks[block]}.{INSIDE[inside]}.scale"
