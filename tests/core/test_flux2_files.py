"""LoRA files of FLUX.2 in the dialects that are met: read exactly, fused or not, and told from Flux.1's, which has the
same names for other layers."""

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
    return case("flux2")  # type: ignore[return-value]


def test_ours_is_read_again_to_the_bit_in_pefts_names_without_alpha(model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    save_lora(path := tmp_path / "a.safetensors", state, "flux2")
    found = load_lora(path, [target.name for target in targets])
    assert found.family == "flux2" and found.metadata["modelspec.architecture"] == "flux-2/lora"
    assert_same(fit(found.state, targets), state)


@pytest.mark.parametrize(
    "written",
    [peft("transformer."), peft("diffusion_model."), peft("base_model.model.", "default"), kohya("lora_unet_")],
    ids=["diffusers", "ComfyUI", "peft", "kohya"],
)
def test_every_dialect_is_read_exactly(written: Any, model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    found = load_lora(foreign(tmp_path / "a.safetensors", written(state)), [target.name for target in targets])
    assert found.family == "flux2"
    assert_same(fit(found.state, targets), state)


@pytest.mark.parametrize("wanted", [None, "flux2"])
def test_fused_layers_come_apart_and_are_told_from_flux_1s_by_their_shapes(
    wanted: str | None, model: tuple, tmp_path: Path
) -> None:
    """A gated feed-forward has six times its inputs, Flux.1's four times."""
    _, targets, state = model
    found = load_lora(foreign(tmp_path / "a.safetensors", fused("flux2", state)), [t.name for t in targets], wanted)
    assert found.family == "flux2"
    assert_same_products(found.state, state)


def test_a_file_of_flux_2_is_refused_by_flux_1_and_the_other_way(model: tuple, tmp_path: Path) -> None:
    path = foreign(tmp_path / "a.safetensors", fused("flux2", model[2]))
    with pytest.raises(OneStepError, match=r"a LoRA for the transformer of FLUX\.2, but this model is .* of Flux"):
        load_lora(path, family="flux")
    a, b = torch.ones(2, 8), torch.ones(32, 2)
    other = {"diffusion_model.double_blocks.0.img_mlp.0.lora_A.weight": a}
    other["diffusion_model.double_blocks.0.img_mlp.0.lora_B.weight"] = b
    with pytest.raises(OneStepError, match=r"of Flux, but this model is the transformer of FLUX\.2"):
        load_lora(foreign(tmp_path / "b.safetensors", other), family="flux2")


@pytest.mark.parametrize(
    ("layer", "family"),
    [
        ("single_transformer_blocks.0.attn.to_out", "flux2"),
        ("single_transformer_blocks.0.attn.to_qkv_mlp_proj", "flux2"),
        ("transformer_blocks.0.ff_context.linear_out", "flux2"),
        ("single_transformer_blocks.0.norm.linear", "flux"),
        ("single_blocks.3.modulation.lin", "flux"),
        ("double_blocks.3.txt_mod.lin", "flux"),
    ],
)
def test_a_layer_of_one_family_alone_decides(layer: str, family: str) -> None:
    for key in (f"transformer.{layer}.lora_A.weight", f"lora_unet_{layer.replace('.', '_')}.lora_down.weight"):
        assert {family_of_keys([key], wanted) for wanted in (None, *FAMILIES)} == {family}, key


def test_attention_alone_is_the_wanted_familys() -> None:
    for layer, names in {
        "double_blocks.0.img_attn.qkv": ["flux", "flux2", "chroma"],
        "transformer_blocks.0.attn.to_q": ["sd3", "flux", "flux2", "chroma"],
    }.items():
        keys = [f"diffusion_model.{layer}.lora_A.weight"]
        assert [family_of_keys(keys, name) for name in names] == names and family_of_keys(keys) == names[0]


def test_a_layer_that_no_file_of_ours_reaches_is_refused_with_why(model: tuple, tmp_path: Path) -> None:
    keys = {f"diffusion_model.double_stream_modulation_img.lin.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    with pytest.raises(OneStepError, match="double_stream_modulation_img.lin', which is not adapted here"):
        load_lora(foreign(tmp_path / "a.safetensors", keys), family="flux2")
