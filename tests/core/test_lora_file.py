"""LoRA files: ours byte for byte, read by diffusers to the same numbers; those that do not fit refused with a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import small_networks as small
import torch
from diffusers import (
    AnimaModularPipeline,
    ChromaPipeline,
    DDIMScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    Krea2Pipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    WanPipeline,
    ZImagePipeline,
)
from diffusers import FlowMatchEulerDiscreteScheduler as FlowScheduler
from diffusers import StableDiffusionXLPipeline as SDXLPipeline
from lora_files import assert_same, case, factors, foreign
from narrowed import narrowed
from torch import Tensor

from onestep.core import lora_file
from onestep.core.errors import OneStepError
from onestep.core.families import select
from onestep.core.lora_file import LoraFile, fit, load_lora, save_lora

# Ours


@pytest.mark.parametrize("name", small.CASES)
def test_file_to_state_to_file_is_bit_identical(name: str, tmp_path: Path) -> None:
    _, targets, state = case(name)
    family = small.CASES[name].family
    save_lora(tmp_path / "a.safetensors", state, family, '{"steps": 1}', {"ss_steps": "7", "note": "schöner 龍"})
    loaded = load_lora(tmp_path / "a.safetensors", [target.name for target in targets])
    assert_same(loaded.state, state)
    assert (loaded.family, loaded.recipe, loaded.unused) == (family, '{"steps": 1}', ())
    save_lora(tmp_path / "b.safetensors", loaded.state, loaded.family, loaded.recipe, loaded.metadata)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert_same(load_lora(tmp_path / "a.safetensors").state, state)  # no names needed: the file tells enough


def test_a_unet_is_written_in_kohyas_names_with_alpha_equal_to_rank(tmp_path: Path) -> None:
    _, _, state = case("sd15")
    save_lora(tmp_path / "a.safetensors", state, "unet")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        keys, header = set(file.keys()), file.metadata()
        assert len(keys) == 3 * len(state)
        path = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0"
        a, b = state["down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"]
        assert torch.equal(file.get_tensor(f"{path}.lora_down.weight"), a)
        assert torch.equal(file.get_tensor(f"{path}.lora_up.weight"), b)
        assert file.get_tensor(f"{path}.alpha").item() == 3
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("3", "3")
    assert header["modelspec.title"] == "a" and header["modelspec.hash_sha256"].startswith("0x")


def test_a_transformer_is_written_in_pefts_names_without_alpha(tmp_path: Path) -> None:
    _, _, state = case("flux")
    save_lora(tmp_path / "a.safetensors", state, "flux")
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert tensors.keys() == {f"transformer.{name}.lora_{x}.weight" for name in state for x in "AB"}


# PixArt's class in diffusers has no loader of LoRAs
@pytest.mark.parametrize("name", narrowed((name for name in small.CASES if name != "pixart"), "sd15", "sd3"))
def test_diffusers_own_loader_gives_the_same_prediction(name: str, tmp_path: Path) -> None:
    network, targets, state = case(name)
    run, inputs = small.CASES[name].run, small.inputs_of(name, torch.float32)
    save_lora(tmp_path / "a.safetensors", state, small.CASES[name].family)
    pipeline = pipeline_of(name, small.network_of(name, torch.float32))
    plain = run(network, inputs)
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    loaded = run(getattr(pipeline, "unet", None) or pipeline.transformer, inputs)
    small.merged(network, targets, state)
    expected = run(network, inputs)
    assert (loaded - expected).norm() < 1e-5 * (expected - plain).norm()


MODERN: dict[str, Any] = {"z_image": ZImagePipeline, "qwen_image": QwenImagePipeline, "krea2": Krea2Pipeline}
MODERN |= {"flux2": Flux2KleinPipeline, "wan": WanPipeline, "chroma": ChromaPipeline}


def pipeline_of(name: str, network: Any) -> Any:
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if name == "sd15":
        return StableDiffusionPipeline(
            **none,
            unet=network,
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
        )
    if name in MODERN:
        return MODERN[name](**none, transformer=network, scheduler=FlowScheduler())
    if name == "anima":
        pipe = AnimaModularPipeline()
        pipe.update_components(transformer=network)
        return pipe
    none |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    if name == "sdxl":
        return SDXLPipeline(**none, unet=network, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False))
    if name == "flux":
        return FluxPipeline(**none, transformer=network, scheduler=FlowScheduler())
    none |= dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    return StableDiffusion3Pipeline(**none, transformer=network, scheduler=FlowScheduler())


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_lora_of_some_layers_is_read_with_the_names_of_those_alone(name: str, tmp_path: Path) -> None:
    _, targets, state = case(name)
    names = [target.name for target in select(targets, "attention")]
    chosen = {layer: state[layer] for layer in names}
    save_lora(tmp_path / "a.safetensors", chosen, small.CASES[name].family)
    assert_same(load_lora(tmp_path / "a.safetensors", names).state, chosen)


def test_ranks_that_differ_are_filled_up_with_zeros(tmp_path: Path) -> None:
    _, _, state = case("sd3")
    a, b = state["proj_out"]
    state["proj_out"] = a[:1], b[:, :1]
    save_lora(tmp_path / "a.safetensors", state, "sd3")
    loaded = load_lora(tmp_path / "a.safetensors").state
    assert all(len(a) == 3 for a, _ in loaded.values())
    new_a, new_b = loaded["proj_out"]
    assert torch.equal(new_b @ new_a, b[:, :1] @ a[:1])


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    _, _, state = case("sd15")
    good = tmp_path / "a.safetensors"
    save_lora(good, state, "unet")
    before = good.read_bytes()
    state["conv_in"][1][0, 0] = float("nan")
    with pytest.raises(OneStepError, match="conv_in"):
        save_lora(good, state, "unet")
    (tmp_path / "folder.safetensors").mkdir()
    state["conv_in"][1][0, 0] = 0.0
    with pytest.raises(OneStepError, match="Cannot write"):
        save_lora(tmp_path / "folder.safetensors", state, "unet")
    with pytest.raises(OneStepError, match="Cannot write"):
        save_lora(tmp_path / "missing" / "a.safetensors", state, "unet")
    assert good.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "folder.safetensors"]


# Refused


OTHER_KINDS = {
    "DoRA": "lora_unet_conv_in.dora_scale",
    "LoHa": "lora_unet_conv_in.hada_w1_a",
    "LoKr": "lora_unet_conv_in.lokr_w1",
    "OFT": "lora_unet_conv_in.oft_blocks",
    "GLoRA": "lora_unet_conv_in.a1.weight",
    "Tucker": "lora_unet_conv_in.lora_mid.weight",
    "biases": "unet.conv_in.lora_B.bias",
    "full weight": "diffusion_model.input_blocks.0.0.diff",
    "no part of a LoRA": "unet.conv_in.weight",
    "LoRA is for Wan image-to-video": "lora_unet_blocks_0_cross_attn_k_img.lora_down.weight",
    "does not have": "lora_unet_down_blocks_0_oddity.lora_down.weight",
    "lacks one": "unet.conv_in.lora_A.weight",
}


@pytest.mark.parametrize("word", OTHER_KINDS)
def test_other_adapters_and_unknown_keys_are_refused_by_name(word: str, tmp_path: Path) -> None:
    a, b = factors()
    tensors = {OTHER_KINDS[word]: a}
    if "Wan" not in word:
        tensors |= {"unet.conv_out.lora_A.weight": a, "unet.conv_out.lora_B.weight": b}
        tensors |= {"unet.mid_block.attentions.0.proj_in.lora_A.weight": a}
        tensors |= {"unet.mid_block.attentions.0.proj_in.lora_B.weight": b}
    with pytest.raises(OneStepError, match=word) as refused:
        load_lora(foreign(tmp_path / "a.safetensors", tensors))
    assert len(str(refused.value)) < 400


def refused_pairs() -> dict[str, dict[str, Tensor]]:
    a, b = factors()
    key = "unet.mid_block.attentions.0.proj_in"
    return {
        "no A and B": {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b[:, :2]},
        "shapes .0, 8.": {f"{key}.lora_A.weight": a[:0], f"{key}.lora_B.weight": b[:, :0]},
        "up to 4096": {f"{key}.lora_A.weight": torch.zeros(5000, 1), f"{key}.lora_B.weight": torch.zeros(1, 5000)},
        "not finite": {f"{key}.lora_A.weight": a * torch.inf, f"{key}.lora_B.weight": b},
        "twice": {
            **{f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b},
            **{f"lora_{key.replace('.', '_')}.lora_down.weight": a, f"lora_{key.replace('.', '_')}.lora_up.weight": b},
        },
    }


@pytest.mark.parametrize("word", refused_pairs())
def test_factors_that_are_no_lora_are_refused(word: str, tmp_path: Path) -> None:
    with pytest.raises(OneStepError, match=word):
        load_lora(foreign(tmp_path / "a.safetensors", refused_pairs()[word]))


def test_a_lora_of_another_base_is_refused(tmp_path: Path) -> None:
    _, targets, state = case("sd15")
    save_lora(tmp_path / "a.safetensors", state, "unet")
    names = [target.name for target in targets]
    with pytest.raises(OneStepError, match="transformer of Flux"):
        load_lora(tmp_path / "a.safetensors", family="flux")
    with pytest.raises(OneStepError, match="another base"):
        load_lora(tmp_path / "a.safetensors", [name for name in names if name != "conv_in"])
    a, b = state["conv_in"]
    with pytest.raises(OneStepError, match="another base: conv_in"):
        fit({**state, "conv_in": (torch.cat([a, a], 1), b)}, targets)
    with pytest.raises(OneStepError, match="another base"):
        fit(state, targets[1:])


def test_a_file_too_large_for_a_lora_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = factors()
    path = foreign(tmp_path / "a.safetensors", {"unet.conv_in.lora_A.weight": a, "unet.conv_in.lora_B.weight": b})
    monkeypatch.setattr(lora_file, "MAX_BYTES", 100)
    monkeypatch.setattr(lora_file, "read_tensors", None)
    with pytest.raises(OneStepError, match="too much for a LoRA"):
        load_lora(path)


def test_a_checkpoint_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = foreign(tmp_path / "a.safetensors", {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)})
    monkeypatch.setattr(lora_file, "read_tensors", None)
    with pytest.raises(OneStepError, match="no part of a LoRA"):
        load_lora(path)


def test_an_empty_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OneStepError, match="no layer"):
        save_lora(tmp_path / "a.safetensors", {}, "unet")
    assert not list(tmp_path.iterdir())


def test_what_is_read_is_a_lora_file(tmp_path: Path) -> None:
    a, b = factors()
    path = foreign(tmp_path / "a.safetensors", {"conv_in.lora_A.weight": a, "conv_in.lora_B.weight": b})
    with pytest.raises(OneStepError, match="known model"):
        load_lora(path)  # the name alone tells no family
    loaded = load_lora(path, family="unet")
    assert isinstance(loaded, LoraFile) and loaded.recipe is None
