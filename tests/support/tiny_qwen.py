"""Qwen-Image's pipeline with random weights, a few channels wide: diffusers' classes with a Qwen2.5-VL as their text
encoder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from tiny_folders import byte_letters, shaken
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
"""Before a prompt: 34 tokens, which both hosts leave out."""
PUBLISHED: dict[str, Any] = {
    **{"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 8192, "max_shift": 0.9},
    **{"shift": 1.0, "shift_terminal": 0.02, "use_dynamic_shifting": True},
}
"""scheduler_config.json of Qwen/Qwen-Image and of 2512."""


def tokenizer(folder: Path | None = None) -> Qwen2Tokenizer:
    """A byte-pair tokenizer that spells every word but those of the template, a token each as the published one has
    them, with the space before it."""
    words = [*byte_letters(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = Qwen2Tokenizer({word: at for at, word in enumerate(words)}, [], pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    told = re.sub(r"<\|im_(start|end)\|>|\n", "|", TEMPLATE)
    made.add_tokens(list(dict.fromkeys(re.findall(r" ?[A-Za-z]+", told))))
    assert len(made(TEMPLATE).input_ids) == 34
    if folder is not None:
        made.save_pretrained(folder)
    return made


def encoder(vocabulary: int, width: int = 128, heads: int = 1) -> Qwen2_5_VLForConditionalGeneration:
    """ComfyUI's heads are 128 wide. Its eyes are as small as can be: no picture is shown to it."""
    half = width // heads // 2
    sections = [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]
    text = {
        **{"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": heads, "num_key_value_heads": 1, "max_position_embeddings": 1024},
        **{"rms_norm_eps": 1e-6, "pad_token_id": 256, "bos_token_id": 256, "eos_token_id": 256},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": sections},
    }
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": width}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**eyes, "fullatt_block_indexes": [0]},
        **{f"{kind}_id": 257 for kind in ("image_token", "video_token", "vision_start_token", "vision_end_token")},
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen_image(vae: Any, width: int = 128, heads: int = 1, **scheduler: Any) -> QwenImagePipeline:
    """Two blocks. width: of a text token."""
    words = tokenizer()
    transformer = QwenImageTransformer2DModel(
        **{"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": width},
        axes_dims_rope=(8, 12, 12),
    )
    return QwenImagePipeline(
        **{"scheduler": FlowMatchEulerDiscreteScheduler(**PUBLISHED | scheduler), "vae": vae},
        **{"transformer": transformer, "text_encoder": encoder(len(words), width, heads), "tokenizer": words},
    )


def qwen_image_folder(folder: Path, vae: Any, width: int = 128, heads: int = 1, **scheduler: Any) -> Path:
    """QwenImagePipeline's layout, with weights of none at its special start."""
    torch.manual_seed(1)
    pipe = qwen_image(vae, width, heads, **scheduler)
    shaken(pipe.transformer, 3)
    shaken(pipe.text_encoder, 4)
    pipe.save_pretrained(folder)
    return folder
