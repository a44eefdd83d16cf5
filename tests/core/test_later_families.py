"""LoRAs of known families that are not served are refused by name, also where their attention's names are another's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from onestep.core.errors import OneStepError
from onestep.core.families import choices, refuse_name
from onestep.core.lora_file import load_lora

KEYS = [
    ("diffusion_model.nerf_blocks.0.param_generator", "Chroma Radiance"),
    ("lora_unet_img_in_patch", "Chroma Radiance"),
    ("diffusion_model.joint_transformer_blocks.0.attn.to_q", "AuraFlow"),
    ("diffusion_model.double_stream_blocks.0.block.attn1.to_q", "HiDream"),
    ("diffusion_model.double_blocks.0.img_attn_qkv", "HunyuanVideo"),
]


@pytest.mark.parametrize(("layer", "whose"), KEYS)
@pytest.mark.parametrize("wanted", [None, "sd3", "qwen_image"])
def test_a_later_familys_lora_is_refused_by_name(layer: str, whose: str, wanted: str | None, tmp_path: Path) -> None:
    """The attention's other layers, whose names SD3 and Qwen-Image have too, come before it in the file."""
    keys = ["transformer.transformer_blocks.0.attn.to_q", layer] if "transformer_blocks" in layer else [layer]
    ends = ("lora_down", "lora_up") if layer.startswith("lora_unet") else ("lora_A", "lora_B")
    tensors = {f"{key}.{end}.weight": torch.ones(2, 2) for key in keys for end in ends}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(OneStepError, match=f"This LoRA is for {whose} .*not served: use one for") as refused:
        load_lora(tmp_path / "a.safetensors", family=wanted)
    assert choices() in str(refused.value)


@pytest.mark.parametrize(
    ("family", "name", "whose"),
    [
        ("qwen_image", "qwen_image_edit_2509_fp8_e4m3fn", "Qwen-Image-Edit"),
        ("qwen_image", "Qwen-Image-Edit-Lightning", "Qwen-Image-Edit"),
        ("flux2", "flux-2-klein-9b-kv", "FLUX.2 klein KV"),
    ],
)
def test_an_editing_model_of_the_same_weights_is_known_by_its_files_name(family: str, name: str, whose: str) -> None:
    with pytest.raises(OneStepError, match=f"{name} is {whose}.*, which is not served: use "):
        refuse_name(family, name)


@pytest.mark.parametrize(
    ("family", "name"),
    [("qwen_image", "qwen_image_2512"), ("qwen_image", "edited-portraits-qwen"), ("flux2", "kvass"), ("unet", "a-kv")],
)
def test_other_names_are_nobodys(family: str, name: str) -> None:
    refuse_name(family, name)
