"""LoRA files of Z-Image in the dialects that are met: read exactly, fused or not; a sister family's are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_dialects import Factors, flat, kohya, peft
from lora_files import assert_same, case, foreign

from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES
from onestep.core.lora_file import fit, load_lora, save_lora
from onestep.core.lora_keys import family_of_keys

BLOCK = "layers.0.attention"


@pytest.fixture(scope="module")
def model() -> tuple[object, list[object], Factors]:
    return case("z_image")  # type: ignore[return-value]


def test_ours_is_read_again_to_the_bit_in_pefts_names_without_alpha(model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    save_lora(path := tmp_path / "a.safetensors", state, "z_image")
    found = load_lora(path, [target.name for target in targets])
    assert found.family == "z_image" and found.metadata["modelspec.architecture"] == "z-image/lora"
    assert_same(fit(found.state, targets), state)


@pytest.mark.parametrize(
    "written",
    [peft("transformer."), peft("diffusion_model."), peft("base_model.model.", "default"), kohya("lora_unet_")],
    ids=["diffusers", "ComfyUI", "peft", "kohya"],
)
def test_every_dialect_is_read_exactly(written: object, model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    found = load_lora(foreign(tmp_path / "a.safetensors", written(state)), [target.name for target in targets])  # type: ignore[operator]
    assert found.family == "z_image"
    assert_same(fit(found.state, targets), state)


@pytest.mark.parametrize("name", ["diffusion_model.layers.0.attention.qkv", "lora_unet_layers_0_attention_qkv"])
def test_a_fused_projection_comes_apart(name: str, model: tuple, tmp_path: Path) -> None:
    """Rows q, k, v as wide as the layer's input, each with the whole A."""
    _, targets, state = model
    draw = torch.Generator().manual_seed(4)
    width = len(state[f"{BLOCK}.to_q"][1])
    a, b = torch.randn(6, width, generator=draw), torch.randn(3 * width, 6, generator=draw)
    path = foreign(tmp_path / "a.safetensors", {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b})
    found = load_lora(path, [target.name for target in targets]).state
    rows = dict(zip("qkv", b.split(width), strict=True))
    assert_same(found, {f"{BLOCK}.to_{letter}": (a, part) for letter, part in rows.items()})


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("diffusion_model.layers.0.adaLN_modulation.1", "the transformer of Lumina 2, but this model"),
        ("transformer.noise_refiner.0.attn.to_q", "the transformer of Lumina 2, but this model"),
        ("diffusion_model.siglip_refiner.0.attention.qkv", "Z-Image Omni"),
    ],
)
def test_a_sister_familys_is_refused_by_name(name: str, word: str, tmp_path: Path) -> None:
    keys = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    with pytest.raises(OneStepError, match=word):
        load_lora(foreign(tmp_path / "a.safetensors", keys), family="z_image")


def test_which_family_a_file_is_of_is_decided_by_what_is_its_own() -> None:
    """Attention alone is named alike in several: the model that is asked for decides, else the first."""
    for name, layer in {
        "unet": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "sd3": "joint_blocks.0.x_block.attn.qkv",
        "flux": "single_transformer_blocks.0.norm.linear",
        "z_image": "layers.3.attention.to_q",
    }.items():
        for key in (f"transformer.{layer}.lora_A.weight", f"lora_unet_{flat(layer)}.lora_down.weight"):
            assert {family_of_keys([key], wanted) for wanted in (None, *FAMILIES)} == {name}, key
    shared = ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"]
    wanted = [family_of_keys(shared, name) for name in (None, "sd3", "flux", "unet", "z_image")]
    assert wanted == ["sd3", "sd3", "flux", "sd3", "sd3"] and family_of_keys(["text.weight"]) is None
