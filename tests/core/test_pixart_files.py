"""LoRA files of PixArt-Sigma in the dialects that are met: read exactly, fused or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dialects import Factors, fused, kohya, peft
from lora_files import assert_same, assert_same_products, case, foreign

from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES
from onestep.core.lora_file import fit, load_lora, save_lora
from onestep.core.lora_keys import family_of_keys


@pytest.fixture(scope="module")
def model() -> tuple[object, list[Any], Factors]:
    return case("pixart")  # type: ignore[return-value]


def test_ours_is_read_again_to_the_bit(model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    save_lora(path := tmp_path / "a.safetensors", state, "pixart")
    found = load_lora(path, [target.name for target in targets])
    assert found.family == "pixart" and found.metadata["modelspec.architecture"] == "pixart-sigma/lora"
    assert_same(fit(found.state, targets), state)


def test_attention_alone_of_ours_is_known_by_the_header(model: tuple, tmp_path: Path) -> None:
    state = {name: factors for name, factors in model[2].items() if ".attn" in name}
    save_lora(path := tmp_path / "a.safetensors", state, "pixart")
    assert load_lora(path).family == "pixart"


@pytest.mark.parametrize(
    "written",
    [peft("transformer."), peft("base_model.model.", "default"), kohya("lora_unet_"), kohya("lora_transformer_")],
    ids=["diffusers", "peft", "kohya", "OneTrainer"],
)
def test_every_dialect_is_read_exactly(written: Any, model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    found = load_lora(foreign(tmp_path / "a.safetensors", written(state)), [target.name for target in targets])
    assert found.family == "pixart"
    assert_same(fit(found.state, targets), state)


def test_fused_layers_come_apart(model: tuple, tmp_path: Path) -> None:
    """Keys and values of the text are two rows of one layer."""
    path = foreign(tmp_path / "a.safetensors", fused("pixart", model[2]))
    found = load_lora(path, [target.name for target in model[1]])
    assert found.family == "pixart"
    assert_same_products(found.state, model[2])


def test_a_layer_that_is_its_own_decides_and_attention_is_the_wanted_models() -> None:
    for layer in ("adaln_single.linear", "caption_projection.linear_1", "blocks.3.cross_attn.kv_linear", "t_block.1"):
        keys = [f"diffusion_model.{layer}.lora_A.weight"]
        assert {family_of_keys(keys, wanted) for wanted in (None, *FAMILIES)} == {"pixart"}, layer
    keys = ["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"]
    assert family_of_keys(keys, "pixart") == "pixart"


@pytest.mark.parametrize(
    ("layer", "whose"),
    [
        ("transformer.patchify_proj", "LTX"),
        ("transformer.adaln_single.emb.aspect_ratio_embedder.linear_1", "PixArt-Alpha"),
        ("transformer.adaln_single.emb.resolution_embedder.linear_2", "PixArt-Alpha"),
        ("diffusion_model.ar_embedder.mlp.0", "PixArt-Alpha"),
        ("diffusion_model.csize_embedder.mlp.2", "PixArt-Alpha"),
    ],
)
def test_a_look_alikes_file_is_refused_by_name(layer: str, whose: str, tmp_path: Path) -> None:
    keys = {f"{layer}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    with pytest.raises(OneStepError, match=f"This LoRA is for {whose}"):
        load_lora(foreign(tmp_path / "a.safetensors", keys))
