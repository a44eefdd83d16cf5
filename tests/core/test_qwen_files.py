"""LoRA files of Qwen-Image in the dialects that are met, told from those of families with the same names of attention;
look-alikes and variants refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_networks as small
import torch
from lora_dialects import Factors, kohya, peft
from lora_files import assert_same, case, foreign
from torch import Tensor, nn

from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES, bind_diffusers, detect, refuse_pipeline
from onestep.core.families.later import LATER_PIPELINES
from onestep.core.lora_file import fit, load_lora, save_lora
from onestep.core.lora_keys import family_of_keys


@pytest.fixture(scope="module")
def model() -> tuple[object, list[Any], Factors]:
    return case("qwen_image")  # type: ignore[return-value]


def lightning(state: Factors) -> dict[str, Tensor]:
    """The public few-step LoRA's: the paths alone, and an alpha an eighth of the rank."""
    tensors = {}
    for name, (a, b) in state.items():
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": 8 * b}
        tensors[f"{name}.alpha"] = torch.tensor(len(a) / 8)
    return tensors


def test_ours_is_read_again_to_the_bit_in_pefts_names_without_alpha(model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    save_lora(path := tmp_path / "a.safetensors", state, "qwen_image")
    found = load_lora(path, [target.name for target in targets])
    assert found.family == "qwen_image" and found.metadata["modelspec.architecture"] == "qwen-image/lora"
    assert_same(fit(found.state, targets), state)


DIALECTS = {
    **{"diffusers": peft("transformer."), "ComfyUI": peft("diffusion_model."), "lightning": lightning},
    **{"peft": peft("base_model.model.", "default"), "DiffSynth": peft("", "default")},
    **{"kohya": kohya("lora_unet_"), "SimpleTuner": kohya("lycoris_")},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read_exactly(dialect: str, model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    path = foreign(tmp_path / "a.safetensors", DIALECTS[dialect](state))
    found = load_lora(path, [target.name for target in targets])
    assert found.family == "qwen_image"
    assert_same(fit(found.state, targets), state)


@pytest.mark.parametrize("layer", ["img_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1", "txt_mod.1"])
def test_a_layer_that_is_its_own_decides(layer: str) -> None:
    path = f"transformer_blocks.7.{layer}"
    for key in (f"{path}.lora_A.weight", f"lora_unet_{path.replace('.', '_')}.lora_down.weight"):
        assert {family_of_keys([key], wanted) for wanted in (None, *FAMILIES)} == {"qwen_image"}, key


def test_attention_alone_is_the_wanted_familys() -> None:
    for layer in ("to_q", "to_out.0", "add_k_proj", "to_add_out"):
        keys = [f"transformer.transformer_blocks.0.attn.{layer}.lora_A.weight"]
        assert [family_of_keys(keys, name) for name in ("qwen_image", "sd3", "flux")] == ["qwen_image", "sd3", "flux"]


def test_another_familys_file_is_refused(model: tuple, tmp_path: Path) -> None:
    save_lora(path := tmp_path / "a.safetensors", model[2], "qwen_image")
    with pytest.raises(OneStepError, match="for the transformer of Qwen-Image, but this model is the transformer of F"):
        load_lora(path, family="flux")
    a, b = torch.ones(2, 8), torch.ones(8, 2)
    layer = "transformer.single_transformer_blocks.0.attn.to_q"
    other = foreign(tmp_path / "b.safetensors", {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b})
    with pytest.raises(OneStepError, match="is a LoRA for the transformer of Flux, but this .* of Qwen-Image"):
        load_lora(other, family="qwen_image")


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        ("transformer_blocks.0.attn.img_qkv", "Lens"),
        ("transformer_blocks.0.txt_mlp.w2", "Lens"),
        ("time_text_embed.addition_t_embedding", "Qwen-Image-Layered"),
    ],
)
def test_a_look_alikes_file_is_refused_by_name(layer: str, word: str, tmp_path: Path) -> None:
    keys = {f"transformer.{layer}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    with pytest.raises(OneStepError, match=f"This LoRA is for {word}"):
        load_lora(foreign(tmp_path / "a.safetensors", keys))


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"zero_cond_t": True}, "Qwen-Image-Edit"), ({"use_additional_t_cond": True}, "Qwen-Image-Layered")],
)
def test_a_variants_network_is_refused_by_name(settings: dict[str, bool], word: str) -> None:
    network = type(small.network_of("qwen_image"))(num_layers=1, num_attention_heads=1, **settings)
    with pytest.raises(OneStepError, match=rf"^{word} models cannot be adapted yet: use .*Qwen-Image"):
        bind_diffusers(network)


def test_comfyuis_variants_are_refused_by_what_their_trees_have() -> None:
    network = small.network_of("qwen_image")
    network.register_buffer("__index_timestep_zero__", torch.tensor([]))
    with pytest.raises(OneStepError, match="^Qwen-Image-Edit models"):
        detect(network)


@pytest.mark.parametrize("title", ["MageFlowTransformer2DModel", "LensTransformer2DModel"])
def test_a_look_alikes_network_is_refused_by_name(title: str) -> None:
    """Mage-Flow has Qwen-Image's blocks and the children of its root."""
    network = type(title, (nn.Module,), {})()
    for name, child in small.network_of("qwen_image").named_children():
        network.add_module(name, child)
    with pytest.raises(OneStepError, match="^(Mage-Flow|Lens) models cannot be adapted yet"):
        detect(network)


@pytest.mark.parametrize("name", [name for name in LATER_PIPELINES if name.startswith("Qwen")])
def test_pipelines_of_variants_are_refused_by_name(name: str) -> None:
    with pytest.raises(OneStepError, match="^Qwen-Image-(Edit|Layered) models cannot be adapted yet"):
        refuse_pipeline(name)
