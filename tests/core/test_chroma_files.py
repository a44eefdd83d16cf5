"""LoRA files of Chroma in the dialects that are met, told from Flux.1's, whose blocks are the same, by the model that
they are for; its network, its sister's and its variants told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_networks as small
import torch
from lora_dialects import Factors, flat, fused, kohya, peft
from lora_files import assert_same, assert_same_products, case, foreign
from torch import Tensor, nn

from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES, bind_diffusers, block_of, detect
from onestep.core.lora_file import fit, load_lora, save_lora
from onestep.core.lora_keys import family_of_keys


@pytest.fixture(scope="module")
def model() -> tuple[object, list[Any], Factors]:
    """One block of each kind."""
    network = small.chroma()
    targets = bind_diffusers(network)
    return network, targets, small.random_state(targets)


def with_alpha(state: Factors) -> dict[str, Tensor]:
    """ComfyUI's fused names as kohya's sd-scripts write them: each layer's alpha half its rank."""
    tensors = {}
    for key, factor in fused("chroma", state).items():
        path, letter = key.removesuffix(".weight").rsplit(".lora_", 1)
        flattened = f"lora_unet_{flat(path.removeprefix('diffusion_model.'))}"
        tensors[f"{flattened}.lora_{'down' if letter == 'A' else 'up'}.weight"] = factor * (1 if letter == "A" else 2)
        if letter == "A":
            tensors[f"{flattened}.alpha"] = torch.tensor(len(factor) / 2)
    return tensors


def test_ours_is_read_again_to_the_bit_in_pefts_names_without_alpha(model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    save_lora(path := tmp_path / "a.safetensors", state, "chroma")
    found = load_lora(path, [target.name for target in targets])
    assert found.family == "chroma" and found.metadata["modelspec.architecture"] == "chroma/lora"
    assert_same(fit(found.state, targets), state)


DIALECTS = {
    **{"diffusers": peft("transformer."), "ai-toolkit": peft("diffusion_model.")},
    **{"peft": peft("base_model.model.", "default"), "OneTrainer": kohya("lora_transformer_")},
    **{"kohya": kohya("lora_unet_"), "SimpleTuner": kohya("lycoris_")},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read_exactly(dialect: str, model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    path = foreign(tmp_path / "a.safetensors", DIALECTS[dialect](state))
    found = load_lora(path, [target.name for target in targets], "chroma")
    assert found.family == "chroma"
    assert_same(fit(found.state, targets), state)


@pytest.mark.parametrize("written", [lambda state: fused("chroma", state), with_alpha], ids=["ComfyUI", "sd-scripts"])
def test_fused_layers_come_apart(written: Any, model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    path = foreign(tmp_path / "a.safetensors", written(state))
    found = load_lora(path, [target.name for target in targets], "chroma")
    assert found.family == "chroma"
    assert_same_products(found.state, state)


@pytest.mark.parametrize(
    "layer",
    [
        *("single_transformer_blocks.7.attn.to_q", "single_transformer_blocks.7.proj_mlp", "single_blocks.3.linear1"),
        *("transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.ff.net.0.proj", "double_blocks.0.img_attn.qkv"),
    ],
)
def test_blocks_alone_are_the_wanted_models(layer: str) -> None:
    """Flux.1's and Chroma's are the same: a file without modulations tells nothing."""
    for key in (f"transformer.{layer}.lora_A.weight", f"lora_unet_{flat(layer)}.lora_down.weight"):
        assert [family_of_keys([key], name) for name in ("chroma", "flux")] == ["chroma", "flux"]
    single = "single_transformer_blocks" in layer
    assert family_of_keys([key]) in (["flux"] if single else ["sd3", "flux"])


def test_modulations_are_flux_1s_and_their_maker_is_chromas() -> None:
    blocks = "diffusion_model.single_transformer_blocks.0.attn.to_q.lora_A.weight"
    for layer, family in {
        "transformer_blocks.0.norm1_context.linear": "flux",
        "single_blocks.0.modulation.lin": "flux",
        "single_transformer_blocks.0.norm.linear": "flux",
        "double_blocks.0.img_mod.lin": "flux",
        "distilled_guidance_layer.layers.0.in_layer": "chroma",
    }.items():
        keys = [blocks, f"diffusion_model.{layer}.lora_A.weight"]
        assert {family_of_keys(keys, wanted) for wanted in (None, "flux", "chroma")} == {family}, layer


def test_a_file_with_modulations_is_refused_by_chroma(tmp_path: Path) -> None:
    _, _, state = case("flux")
    save_lora(tmp_path / "ours.safetensors", state, "flux")
    for path in (foreign(tmp_path / "a.safetensors", peft("transformer.")(state)), tmp_path / "ours.safetensors"):
        with pytest.raises(OneStepError, match="a LoRA for the transformer of Flux, but this model is .* of Chroma"):
            load_lora(path, family="chroma")


def test_an_adapted_maker_of_modulations_is_refused_with_why(tmp_path: Path) -> None:
    for layer in ("in_proj", "layers.3.out_layer", "layers.3.linear_1"):
        keys = {f"diffusion_model.distilled_guidance_layer.{layer}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
        with pytest.raises(OneStepError, match=rf"guidance_layer.{layer}', which is not adapted here \(it modulates"):
            load_lora(foreign(tmp_path / "a.safetensors", keys), family="chroma")


def test_the_networks_tell_themselves_apart(model: tuple) -> None:
    assert detect(small.network_of("flux")) == "flux" and detect(model[0]) == "chroma"
    tree = nn.Module()
    for name in ("double_blocks", "single_blocks", "img_in", "distilled_guidance_layer"):
        tree.add_module(name, nn.Linear(2, 2))
    assert detect(tree) == "chroma"
    tree.add_module("nerf_blocks", nn.ModuleList())
    with pytest.raises(OneStepError, match="^Chroma Radiance models cannot be adapted yet: use .*Chroma"):
        detect(tree)


def test_a_single_block_of_comfyuis_is_known_by_what_is_inside() -> None:
    """Flux.1's modulates itself, FLUX.2's has a gate, Chroma's neither; FLUX.2's latents are tokens."""

    class SingleStreamBlock(nn.Module):
        def __init__(self, **inside: nn.Module) -> None:
            super().__init__()
            for name, module in inside.items():
                self.add_module(name, module)

    gate = nn.Module()
    gate.gate_fn = nn.SiLU()
    found = [block_of(SingleStreamBlock(**inside)) for inside in ({"modulation": gate}, {"mlp_act": gate}, {})]
    wanted = [FAMILIES[name].blocks["SingleStreamBlock"] for name in ("flux", "flux2", "chroma")]
    assert found == wanted and [block.patch for block in found] == [2, 1, 2]
