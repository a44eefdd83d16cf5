"""LoRA files of Anima: written by ComfyUI's paths, read exactly in the dialects that are met, told from those of Wan,
PixArt and LTX, whose layers have like names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dialects import Factors, kohya, peft
from lora_files import assert_same, case, foreign
from safetensors.torch import load_file
from torch import nn

from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES, detect
from onestep.core.lora_file import fit, load_lora, save_lora
from onestep.core.lora_keys import family_of_keys


@pytest.fixture(scope="module")
def model() -> tuple[object, list[Any], Factors]:
    return case("anima")  # type: ignore[return-value]


def native(state: Factors) -> Factors:
    """The same by ComfyUI's paths; no layer is fused."""
    table = {row.names[0]: row.host for row in FAMILIES["anima"].rows(2)}
    return {table[name]: factors for name, factors in state.items()}


def test_ours_is_in_comfyuis_names_without_alpha_and_read_again_to_the_bit(model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    save_lora(path := tmp_path / "a.safetensors", state, "anima")
    keys = load_file(path).keys()
    assert len(state) == 6 + 2 * 16 and len(keys) == 2 * len(state) and not any("alpha" in key for key in keys)
    assert "diffusion_model.blocks.1.cross_attn.output_proj.lora_B.weight" in keys
    assert "diffusion_model.t_embedder.1.linear_2.lora_A.weight" in keys
    for wanted in (None, "anima"):
        found = load_lora(path, [target.name for target in targets], wanted)
        assert found.family == "anima"
        assert_same(fit(found.state, targets), state)
    save_lora(again := tmp_path / "b.safetensors", found.state, "anima")
    assert path.read_bytes()[-1000:] == again.read_bytes()[-1000:] and load_file(again).keys() == keys


@pytest.mark.parametrize("wanted", [None, "anima"])
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
    ids=["ComfyUI", "ComfyUI's down", "kohya", "peft", "diffusers", "kohya of diffusers"],
)
def test_every_dialect_is_read_exactly(
    written: Any, names: Any, wanted: str | None, model: tuple, tmp_path: Path
) -> None:
    _, targets, state = model
    tensors = written(names(state))
    found = load_lora(foreign(tmp_path / "a.safetensors", tensors), [t.name for t in targets], wanted)
    assert found.family == "anima"
    assert_same(fit(found.state, targets), state)


def test_alpha_is_folded(model: tuple, tmp_path: Path) -> None:
    """tdrussell's diffusion-pipe and sd-scripts write it beside ComfyUI's names."""
    _, targets, state = model
    tensors = kohya("lora_unet_")(native(state))
    tensors |= {key.replace("lora_down.weight", "alpha"): torch.tensor(1.5) for key in tensors if "down" in key}
    found = load_lora(foreign(tmp_path / "a.safetensors", tensors), [t.name for t in targets], "anima")
    for name, (a, b) in state.items():
        torch.testing.assert_close(found.state[name][1] @ found.state[name][0], 1.5 / len(a) * b @ a, msg=name)


def test_what_a_file_holds_for_the_text_s_adapter_is_left_out_and_said(
    model: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, targets, state = model
    layer = "llm_adapter.blocks.0.self_attn.q_proj"
    for number, (tensors, more) in enumerate(
        [
            (peft("diffusion_model.")(native(state)), f"diffusion_model.{layer}.lora_%s.weight"),
            (kohya("lora_unet_")(native(state)), f"lora_unet_{layer.replace('.', '_')}.lora_%s.weight"),
            (peft("transformer.")(dict(state)), "text_conditioner.blocks.0.self_attn.q_proj.lora_%s.weight"),
        ]
    ):
        letters = ("down", "up") if "unet" in more else ("A", "B")
        tensors |= {more % letter: torch.ones(2, 2) for letter in letters}
        found = load_lora(foreign(tmp_path / f"{number}.safetensors", tensors), [t.name for t in targets], "anima")
        assert_same(fit(found.state, targets), state)
        assert len(found.unused) == 2
        with caplog.at_level(logging.WARNING):
            found.say_left_out(tmp_path / "a.safetensors")
        assert "2 keys of text encoders are left out" in caplog.text


@pytest.mark.parametrize(
    ("key", "whose"),
    [
        ("lora_unet_blocks_0_cross_attn_k_img.lora_down.weight", "Wan image-to-video"),
        ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", "Anima, PixArt-Sigma or LTX, whose layers"),
    ],
)
def test_like_names_are_told_apart(key: str, whose: str, tmp_path: Path) -> None:
    with pytest.raises(OneStepError, match=f"This LoRA is for {whose}"):
        load_lora(foreign(tmp_path / "a.safetensors", {key: torch.ones(2, 2)}))


def test_attention_alone_in_diffusers_names_is_the_wanted_familys(model: tuple, tmp_path: Path) -> None:
    """PixArt's and LTX's layers have these names too: the model that it is for decides."""
    _, targets, state = model
    part = {name: factors for name, factors in state.items() if ".attn" in name}
    path = foreign(tmp_path / "a.safetensors", peft("transformer.")(part))
    found = load_lora(path, [target.name for target in targets], "anima")
    assert found.family == "anima" and found.state.keys() == part.keys()
    for wanted in (None, "sd3", "flux", "flux2"):
        with pytest.raises(
            OneStepError, match="for Anima, PixArt-Sigma or LTX, whose layers have the same names .* give the model"
        ):
            load_lora(path, family=wanted)


def test_a_file_of_another_model_of_its_layers_is_refused_by_their_sizes(model: tuple, tmp_path: Path) -> None:
    """Cosmos-Predict2's 14 B has the same names, PixArt's attention too."""
    _, targets, _ = model
    keys = {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 1152)}
    keys["transformer.transformer_blocks.0.attn1.to_q.lora_B.weight"] = torch.ones(1152, 2)
    found = load_lora(foreign(tmp_path / "a.safetensors", keys), [target.name for target in targets], "anima")
    with pytest.raises(OneStepError, match="made for another base"):
        fit(found.state, targets)


@pytest.mark.parametrize(
    "layer",
    ["blocks.0.self_attn.q_proj", "blocks.0.mlp.layer1", "blocks.3.adaln_modulation_cross_attn.2"],
)
def test_a_layer_of_anima_alone_decides(layer: str) -> None:
    for key in (f"diffusion_model.{layer}.lora_A.weight", f"lora_unet_{layer.replace('.', '_')}.lora_down.weight"):
        assert {family_of_keys([key], wanted) for wanted in (None, *FAMILIES)} == {"anima"}, key


class MiniTrainDIT(nn.Module):
    """By its name: ComfyUI's Cosmos-Predict2, which Anima's class inherits from."""


def test_cosmos_predict2_is_refused_by_name() -> None:
    with pytest.raises(OneStepError, match="Cosmos-Predict2 models cannot be adapted yet: use .*Anima"):
        detect(MiniTrainDIT())


@pytest.mark.parametrize("part", ["crossattn_proj", "img_context_proj", "learnable_pos_embed"])
def test_its_relatives_of_one_class_are_told_by_their_parts(part: str, model: tuple) -> None:
    from small_networks import network_of

    network = network_of("anima")
    assert detect(network) == "anima"
    setattr(network, part, nn.Linear(2, 2))
    with pytest.raises(OneStepError, match="Cosmos.* models cannot be adapted yet"):
        detect(network)
