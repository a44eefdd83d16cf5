"""LoRA files of others: every dialect's names of a layer, fused layers, alpha; read exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora_files import assert_same, case, factors, foreign

from onestep.core.errors import OneStepError
from onestep.core.lora_file import fit, load_lora

DOUBLE, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0"
SINGLE_PARTS = [*(f"{SINGLE}.attn.to_{x}" for x in "qkv"), f"{SINGLE}.proj_mlp"]
BLOCK, BLOCK_ = "transformer_blocks.3", "transformer_blocks_3"


# Those of others: their name of a layer -> ours

SAME_LAYER = [
    ("lora_unet_down_blocks_0_attentions_1_proj_in", "down_blocks.0.attentions.1.proj_in"),
    (f"lora_unet_input_blocks_4_1_{BLOCK_}_attn1_to_q", f"down_blocks.1.attentions.0.{BLOCK}.attn1.to_q"),
    (f"lora_unet_output_blocks_5_1_{BLOCK_}_ff_net_2", f"up_blocks.1.attentions.2.{BLOCK}.ff.net.2"),
    ("lora_unet_output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
    ("lora_unet_middle_block_2_out_layers_3", "mid_block.resnets.1.conv2"),
    ("lora_unet_input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
    ("lora_unet_label_emb_0_0", "add_embedding.linear_1"),
    ("diffusion_model.input_blocks.1.1.proj_in", "down_blocks.0.attentions.0.proj_in"),
    (f"unet.mid_block.attentions.0.{BLOCK}.attn2.to_k", f"mid_block.attentions.0.{BLOCK}.attn2.to_k"),
    ("unet.base_model.model.mid_block.attentions.0.proj_out", "mid_block.attentions.0.proj_out"),
    ("base_model.model.time_embedding.linear_1", "time_embedding.linear_1"),
    ("lycoris_up_blocks_1_resnets_0_conv1", "up_blocks.1.resnets.0.conv1"),
    ("transformer.transformer_blocks.0.attn.to_q", f"{DOUBLE}.to_q"),
    ("lora_transformer_transformer_blocks_0_attn_to_out_0", f"{DOUBLE}.to_out.0"),
    ("lora_unet_double_blocks_0_img_attn_proj", f"{DOUBLE}.to_out.0"),
    ("lora_unet_single_blocks_0_linear2", f"{SINGLE}.proj_out"),
    ("transformer.single_transformer_blocks.0.proj_mlp", f"{SINGLE}.proj_mlp"),
    ("diffusion_model.joint_blocks.0.x_block.mlp.fc1", "transformer_blocks.0.ff.net.0.proj"),
]  # fmt: skip
SUFFIXES = [
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
]


@pytest.mark.parametrize(("theirs", "ours"), SAME_LAYER)
@pytest.mark.parametrize(("down", "up"), SUFFIXES)
def test_names_of_other_trainers(theirs: str, ours: str, down: str, up: str, tmp_path: Path) -> None:
    a, b = factors()
    path = foreign(tmp_path / "a.safetensors", {theirs + down: a, theirs + up: b})
    inside_a_block = "blocks" in theirs or "block_" in theirs or "unet." in theirs or "mid" in theirs
    assert_same(load_lora(path, family=None if inside_a_block else "unet").state, {ours: (a, b)})


def test_names_of_old_diffusers(tmp_path: Path) -> None:
    a, b = factors()
    block = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor"
    names = {f"{block}.to_out_lora.down.weight": a, f"{block}.to_out_lora.up.weight": b}
    loaded = load_lora(foreign(tmp_path / "a.safetensors", names))
    assert_same(loaded.state, {"mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": (a, b)})


def test_blocks_of_an_unusual_unet_are_counted_by_its_own_names(tmp_path: Path) -> None:
    """With one residual block a level, input_blocks.3 is the second level's first block."""
    a, b = factors()
    tensors = {
        "lora_unet_input_blocks_3_1_proj_in.lora_A.weight": a,
        "lora_unet_input_blocks_3_1_proj_in.lora_B.weight": b,
    }
    path = foreign(tmp_path / "a.safetensors", tensors)
    names = [*(f"down_blocks.{i}.resnets.0.conv1" for i in (0, 1)), *(f"up_blocks.{i}.resnets.1.conv1" for i in (0, 1))]
    names.append("down_blocks.1.attentions.0.proj_in")
    assert list(load_lora(path, names).state) == ["down_blocks.1.attentions.0.proj_in"]


FUSED = [
    ("flux", "lora_unet_double_blocks_0_img_attn_qkv", [f"{DOUBLE}.to_{x}" for x in "qkv"], (8, 8, 8)),
    ("flux", "diffusion_model.double_blocks.0.txt_attn.qkv", [f"{DOUBLE}.add_{x}_proj" for x in "qkv"], (8, 8, 8)),
    ("flux", "lora_unet_single_blocks_0_linear1", SINGLE_PARTS, (8, 8, 8, 32)),
    ("flux", "diffusion_model.single_blocks.0.linear1", SINGLE_PARTS, (8, 8, 8, 20)),
    ("flux", "diffusion_model.single_blocks.0.linear1_qkv", SINGLE_PARTS[:3], (8, 8, 8)),
    ("sd3", "diffusion_model.joint_blocks.0.x_block.attn.qkv", [f"{DOUBLE}.to_{x}" for x in "qkv"], (8, 8, 8)),
    ("sd3", "lora_unet_joint_blocks_0_context_block_attn_qkv", [f"{DOUBLE}.add_{x}_proj" for x in "qkv"], (8, 8, 8)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "theirs", "ours", "widths"), FUSED)
def test_fused_layers_come_apart_exactly(
    family: str, theirs: str, ours: list[str], widths: tuple[int, ...], tmp_path: Path
) -> None:
    a, b = factors(outputs=sum(widths))
    path = foreign(tmp_path / "a.safetensors", {f"{theirs}.lora_down.weight": a, f"{theirs}.lora_up.weight": b})
    loaded = load_lora(path)
    assert loaded.family == family
    rows = b.split(widths)
    assert_same(loaded.state, {name: (a, part) for name, part in zip(ours, rows, strict=True)})


def test_a_fused_layer_of_another_width_is_refused(tmp_path: Path) -> None:
    a, b = factors(outputs=25)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    path = foreign(tmp_path / "a.safetensors", {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b})
    with pytest.raises(OneStepError, match="25 outputs"):
        load_lora(path)


def test_the_final_modulation_returns_to_diffusers_order(tmp_path: Path) -> None:
    a, b = factors(outputs=16)
    tensors = {
        "diffusion_model.final_layer.adaLN_modulation.1.lora_A.weight": a,
        "diffusion_model.final_layer.adaLN_modulation.1.lora_B.weight": b,
        "diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.lora_A.weight": a,
        "diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.lora_B.weight": b,
        "diffusion_model.joint_blocks.1.x_block.adaLN_modulation.1.lora_A.weight": a,
        "diffusion_model.joint_blocks.1.x_block.adaLN_modulation.1.lora_B.weight": b,
    }
    shift, scale = b.chunk(2)
    swapped = torch.cat([scale, shift])
    state = load_lora(foreign(tmp_path / "a.safetensors", tensors)).state
    expected = {"norm_out.linear": (a, swapped), "transformer_blocks.0.norm1_context.linear": (a, swapped)}
    assert_same(state, {**expected, "transformer_blocks.1.norm1.linear": (a, b)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_alpha_is_folded_into_b(dtype: torch.dtype, tmp_path: Path) -> None:
    a, b = (factor.to(dtype) for factor in factors(rank=4))
    key = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(1.0, dtype=dtype)}
    state = load_lora(foreign(tmp_path / "a.safetensors", tensors)).state
    assert_same(state, {"mid_block.attentions.0.proj_in": (a.float(), b.float() / 4)})


def test_alpha_in_pefts_settings_is_folded_into_b(tmp_path: Path) -> None:
    a, b = factors(rank=4)
    tensors, name = {}, "proj_out"
    for layer in (f"{DOUBLE}.to_q", name):
        tensors |= {f"transformer.{layer}.lora_A.weight": a, f"transformer.{layer}.lora_B.weight": b}
    settings = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {name: 2}}
    path = foreign(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(settings)})
    assert_same(load_lora(path).state, {f"{DOUBLE}.to_q": (a, b * 2), name: (a, b / 2)})


def test_text_encoders_are_named_as_unused(tmp_path: Path) -> None:
    a, b = factors()
    tensors = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": a}
    tensors |= {"lora_unet_conv_in.lora_down.weight": a, "lora_unet_conv_in.lora_up.weight": b}
    loaded = load_lora(foreign(tmp_path / "a.safetensors", tensors), family="unet")
    assert loaded.unused == ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",)
    assert list(loaded.state) == ["conv_in"]


def test_one_by_one_convolutions_and_linears_hold_the_same_numbers() -> None:
    _, targets, state = case("sd15")
    flat = {name: (a.flatten(1) if a.shape[2:].numel() == 1 else a, b.flatten(1)) for name, (a, b) in state.items()}
    fitted = fit(flat, targets)
    assert_same(fitted, state)
