"""LoRA files of Wan: written by ComfyUI's paths, read exactly in the dialects that are met, told from those of its
variants and of families whose layers have like names; networks of the variants are refused by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from lora_dialects import Factors, kohya, peft
from lora_files import assert_same, case, foreign
from safetensors.torch import load_file, save_file
from small_networks import CASES, network_of
from torch import nn

from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES, detect
from onestep.core.lora_file import fit, load_lora, save_lora
from onestep.core.lora_keys import family_of_keys


@pytest.fixture(scope="module")
def model() -> tuple[object, list[Any], Factors]:
    return case("wan")  # type: ignore[return-value]


def native(state: Factors) -> Factors:
    """The same by ComfyUI's paths; no layer is fused."""
    table = {row.names[0]: row.host for row in FAMILIES["wan"].rows(2)}
    return {table[name]: factors for name, factors in state.items()}


def test_ours_is_in_comfyuis_names_without_alpha_and_read_again_to_the_bit(model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    save_lora(path := tmp_path / "a.safetensors", state, "wan")
    keys = load_file(path).keys()
    assert len(state) == 6 + 2 * 10 and len(keys) == 2 * len(state) and not any("alpha" in key for key in keys)
    assert "diffusion_model.blocks.1.cross_attn.o.lora_B.weight" in keys
    assert (
        "diffusion_model.time_projection.1.lora_A.weight" in keys and "diffusion_model.head.head.lora_A.weight" in keys
    )
    for wanted in (None, "wan"):
        found = load_lora(path, [target.name for target in targets], wanted)
        assert found.family == "wan"
        assert_same(fit(found.state, targets), state)
    save_lora(again := tmp_path / "b.safetensors", found.state, "wan")
    assert path.read_bytes()[-1000:] == again.read_bytes()[-1000:] and load_file(again).keys() == keys


@pytest.mark.parametrize("wanted", [None, "wan"])
@pytest.mark.parametrize(
    ("written", "names"),
    [
        (peft("diffusion_model."), native),
        (kohya("diffusion_model.", str), native),
        (kohya("lora_unet_"), native),
        (peft("base_model.model.", "default"), native),
        (peft("transformer."), dict),
        (kohya("lora_unet_"), dict),
    ],
    ids=["ComfyUI", "LightX2V", "kohya", "peft", "diffusers", "kohya of diffusers"],
)
def test_every_dialect_is_read_exactly(
    written: Any, names: Any, wanted: str | None, model: tuple, tmp_path: Path
) -> None:
    _, targets, state = model
    tensors = written(names(state))
    found = load_lora(foreign(tmp_path / "a.safetensors", tensors), [t.name for t in targets], wanted)
    assert found.family == "wan"
    assert_same(fit(found.state, targets), state)


def test_alpha_is_folded(model: tuple, tmp_path: Path) -> None:
    """LightX2V's and musubi-tuner's files have it."""
    _, targets, state = model
    tensors = kohya("diffusion_model.", str)(native(state))
    tensors |= {key.replace("lora_down.weight", "alpha"): torch.tensor(1.5) for key in tensors if "down" in key}
    found = load_lora(foreign(tmp_path / "a.safetensors", tensors), [t.name for t in targets], "wan")
    for name, (a, b) in state.items():
        torch.testing.assert_close(found.state[name][1] @ found.state[name][0], 1.5 / len(a) * b @ a, msg=name)


@pytest.mark.parametrize("key", ["blocks.0.self_attn.norm_q.diff", "blocks.0.ffn.0.diff_b", "head.head.diff"])
def test_weight_differences_beside_a_lora_are_refused_with_the_way_to_draw_with_them(
    key: str, model: tuple, tmp_path: Path
) -> None:
    tensors = kohya("diffusion_model.", str)(native(model[2])) | {f"diffusion_model.{key}": torch.ones(2)}
    with pytest.raises(OneStepError, match="full weight differences .*LoraLoaderModelOnly, .*choose its recipe by na"):
        load_lora(foreign(tmp_path / "a.safetensors", tensors), family="wan")


def test_a_layer_that_is_not_adapted_is_refused_with_the_reason(model: tuple, tmp_path: Path) -> None:
    tensors = peft("diffusion_model.")(native(model[2]))
    tensors |= {f"diffusion_model.patch_embedding.lora_{ab}.weight": torch.ones(2, 2) for ab in "AB"}
    with pytest.raises(OneStepError, match="not adapted here .a convolution of three dimensions"):
        load_lora(foreign(tmp_path / "a.safetensors", tensors), family="wan")


LIKE = {
    "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": "Wan image-to-video",
    "lora_unet_img_emb_proj_1.lora_down.weight": "Wan image-to-video",
    "transformer.blocks.0.attn2.add_k_proj.lora_A.weight": "Wan image-to-video",
    "diffusion_model.vace_blocks.0.self_attn.q.lora_A.weight": "Wan VACE",
    "diffusion_model.face_adapter.fuser_blocks.0.linear1_kv.lora_A.weight": "Wan Animate",
    "diffusion_model.audio_injector.injector.0.q.lora_A.weight": "Wan S2V",
}


@pytest.mark.parametrize("key", LIKE)
def test_loras_of_its_variants_are_refused_by_name(key: str, model: tuple, tmp_path: Path) -> None:
    tensors = peft("diffusion_model.")(native(model[2])) | {key: torch.ones(2, 2)}
    for wanted in (None, "wan"):
        with pytest.raises(OneStepError, match=f"This LoRA is for {LIKE[key]} "):
            load_lora(foreign(tmp_path / "a.safetensors", tensors), family=wanted)


@pytest.mark.parametrize(
    "layer", ["blocks.0.self_attn.q", "blocks.3.cross_attn.o", "blocks.0.ffn.2", "text_embedding.0"]
)
def test_a_layer_of_wan_alone_decides(layer: str) -> None:
    for key in (f"diffusion_model.{layer}.lora_A.weight", f"lora_unet_{layer.replace('.', '_')}.lora_down.weight"):
        assert {family_of_keys([key], wanted) for wanted in (None, *FAMILIES)} == {"wan"}, key


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "z_image", "flux2", "qwen_image", "anima"])
def test_no_other_familys_file_is_taken_for_it(name: str, tmp_path: Path) -> None:
    _, targets, state = case(name)
    for written in (peft("transformer."), kohya("lora_unet_"), peft("unet.")):
        assert family_of_keys(written(state)) != "wan"
    save_lora(path := tmp_path / "a.safetensors", state, CASES[name].family)
    assert load_lora(path, [target.name for target in targets]).family == CASES[name].family


def test_diffusers_names_in_blocks_of_other_names_are_not_wans() -> None:
    for key in ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", "lora_unet_down_blocks_0_attentions_0_x"):
        assert family_of_keys([key]) != "wan"
    assert family_of_keys(["transformer.blocks.0.attn1.to_q.lora_A.weight"]) == "wan"
    assert family_of_keys(["lora_unet_blocks_0_attn1_to_q.lora_down.weight"]) == "wan"
    assert family_of_keys(["lora_transformer_blocks_0_attn1_to_q.lora_down.weight"], "anima") == "wan"
    assert family_of_keys(["lora_transformer_transformer_blocks_0_attn1_to_q.lora_down.weight"]) != "wan"


@pytest.mark.parametrize("layer", ["cross_attn.q_linear", "cross_attn.kv_linear", "attn.qkv"])
def test_pixarts_layers_in_comfyuis_names_are_not_wans(layer: str) -> None:
    for key in (f"diffusion_model.blocks.0.{layer}.x", f"lora_unet_blocks_0_{layer.replace('.', '_')}.x"):
        assert family_of_keys([key]) != "wan"


def test_its_texts_embedding_is_no_text_encoders(model: tuple, tmp_path: Path) -> None:
    """LyCORIS' names of the two begin alike."""
    _, targets, state = model
    tensors = kohya("lycoris_")(native(state)) | {"lycoris_te_text_model_encoder_x.lora_down.weight": torch.ones(2, 2)}
    found = load_lora(foreign(tmp_path / "a.safetensors", tensors), [t.name for t in targets], "wan")
    assert_same(fit(found.state, targets), state)
    assert list(found.unused) == ["lycoris_te_text_model_encoder_x.lora_down.weight"]


MARKS = {
    "vace_patch_embedding": "Wan VACE",
    "control_adapter": "Wan camera control",
    "casual_audio_encoder": "Wan S2V",
    "audio_proj": "HuMo",
    "face_adapter": "Wan Animate",
    "patch_embedding_mask": "SCAIL-2",
    "patch_embedding_pose": "SCAIL",
    "patch_embedding_global": "WanDancer",
    "ref_conv": "Wan Fun Control",
    "img_emb": "Wan image-to-video",
}


@pytest.mark.parametrize("mark", MARKS)
def test_networks_of_its_variants_are_refused_by_name(mark: str) -> None:
    """As ComfyUI's trees have them: Wan's own parts and one more."""
    network = nn.Module()
    for part in (*FAMILIES["wan"].marks, "patch_embedding", "blocks"):
        setattr(network, part, nn.Linear(2, 2))
    assert detect(network) == "wan"
    setattr(network, mark, nn.Linear(2, 2))
    with pytest.raises(OneStepError, match=f"{MARKS[mark]} models cannot be adapted yet: use .*Wan 2.1"):
        detect(network)


def test_diffusers_image_to_video_is_refused_by_name() -> None:
    assert detect(network_of("wan")) == "wan"
    network = WanTransformer3DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 24, "freq_dim": 32, "ffn_dim": 40},
        **{"num_layers": 1, "image_dim": 8, "added_kv_proj_dim": 24, "in_channels": 36},
    )
    with pytest.raises(OneStepError, match="Wan image-to-video models cannot be adapted yet"):
        detect(network)


UNTOLD = "does not say whether it was trained on Wan's text-to-video or image-to-video"
DRAWN = [
    ("a.safetensors", {}, UNTOLD),
    ("wan2.2_t2v_lightx2v.safetensors", {}, ""),
    ("a.safetensors", {"ss_base_model_version": "wan2.2_t2v_a14b"}, ""),
    ("wan2.2_ti2v_5B_dragon.safetensors", {}, ""),
]


@pytest.mark.parametrize(("name", "header", "said"), DRAWN)
def test_a_file_that_does_not_tell_its_base_is_read_with_a_warning(
    name: str, header: dict, said: str, model: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, targets, state = model
    save_file(peft("diffusion_model.")(native(state)), tmp_path / name, header or None)
    found = load_lora(tmp_path / name, [target.name for target in targets], "wan")
    assert_same(fit(found.state, targets), state)
    with caplog.at_level(logging.WARNING):
        found.say_left_out(tmp_path / name)
    assert said in caplog.text and bool(found.said) == bool(said)


def test_our_own_file_tells(model: tuple, tmp_path: Path) -> None:
    save_lora(tmp_path / "a.safetensors", model[2], "wan")
    assert load_lora(tmp_path / "a.safetensors").said == ""


@pytest.mark.parametrize(
    ("name", "header", "channels"),
    [
        ("Wan2.2-Lightning_I2V-A14B-HIGH.safetensors", {}, 0),
        ("a.safetensors", {"modelspec.architecture": "wan2.2-i2v-a14b/lora"}, 0),
        ("a.safetensors", {}, 36),
    ],
)
def test_image_to_video_of_2_2_is_refused_by_name_header_or_its_entrys_channels(
    name: str, header: dict, channels: int, model: tuple, tmp_path: Path
) -> None:
    """It has no layer that text to video lacks."""
    tensors, entry = peft("diffusion_model.")(native(model[2])), "diffusion_model.patch_embedding"
    if channels:
        tensors[f"{entry}.lora_A.weight"] = torch.ones(2, channels, 1, 2, 2)
        tensors[f"{entry}.lora_B.weight"] = torch.ones(24, 2, 1, 1, 1)
    save_file(tensors, tmp_path / name, header or None)
    for wanted in (None, "wan"):
        with pytest.raises(OneStepError, match=r"This LoRA is for Wan image-to-video \("):
            load_lora(tmp_path / name, family=wanted)


HUNYUAN = ["ff.net.0.proj", "ff.net.2", "skip_linear", "default_modulation.1", "attn1.Wqkv", "attn2.kv_proj"]


@pytest.mark.parametrize("layer", HUNYUAN)
@pytest.mark.parametrize("wanted", [None, "wan", "pixart"])
def test_hunyuandits_in_diffusers_names_is_refused_by_its_own_layers(
    layer: str, wanted: str | None, tmp_path: Path
) -> None:
    dots = [f"blocks.0.{path}" for path in ("attn1.to_q", "attn2.to_k", layer)]
    for number, (prefix, paths, ends) in enumerate(
        [
            ("transformer.", dots, ("lora_A.weight", "lora_B.weight")),
            ("lora_unet_", [path.replace(".", "_") for path in dots], ("lora_down.weight", "lora_up.weight")),
        ]
    ):
        tensors = {f"{prefix}{path}.{end}": torch.ones(2, 2) for path in paths for end in ends}
        with pytest.raises(OneStepError, match="This LoRA is for HunyuanDiT "):
            load_lora(foreign(tmp_path / f"{number}.safetensors", tensors), family=wanted)


def test_hunyuandits_attention_alone_is_told_by_the_width_of_its_text(tmp_path: Path) -> None:
    wide = {"attn1.to_q": (1408, 1408), "attn2.to_k": (1024, 1408), "attn2.to_q": (1408, 1408)}
    tensors = {}
    for layer, (inputs, outputs) in wide.items():
        tensors[f"transformer.blocks.0.{layer}.lora_A.weight"] = torch.ones(2, inputs)
        tensors[f"transformer.blocks.0.{layer}.lora_B.weight"] = torch.ones(outputs, 2)
    for wanted in (None, "wan"):
        with pytest.raises(OneStepError, match=r"This LoRA is for HunyuanDiT \(its keys and values"):
            load_lora(foreign(tmp_path / "a.safetensors", tensors), family=wanted)
