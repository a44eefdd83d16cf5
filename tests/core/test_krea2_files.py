"""LoRA files of Krea 2 in the dialects that are met, told from those of families with the same names of attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dialects import Factors, kohya, peft
from lora_files import assert_same, case, foreign
from safetensors.torch import load_file

from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES, select
from onestep.core.families.krea2 import Layout
from onestep.core.lora_file import fit, load_lora, save_lora
from onestep.core.lora_keys import family_of_keys

LAYERS = 8 + 8 * (2 + 4)
"""The ends, two blocks, and four that fuse a text."""


@pytest.fixture(scope="module")
def model() -> tuple[object, list[Any], Factors]:
    return case("krea2")  # type: ignore[return-value]


def native(state: Factors) -> Factors:
    """The same by ComfyUI's paths; no layer is fused."""
    table = {row.names[0]: row.host for row in FAMILIES["krea2"].rows(Layout(2, 2, 2))}
    return {table[name]: factors for name, factors in state.items()}


def without_number(state: Factors) -> Factors:
    """Some tools leave out the number of the attention's last layer."""
    return {name.removesuffix(".0"): factors for name, factors in state.items()}


def test_ours_is_read_again_to_the_bit_in_pefts_names_without_alpha(model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    save_lora(path := tmp_path / "a.safetensors", state, "krea2")
    keys = load_file(path).keys()
    assert len(state) == LAYERS and len(keys) == 2 * LAYERS
    assert "transformer.transformer_blocks.1.attn.to_gate.lora_A.weight" in keys
    found = load_lora(path, [target.name for target in targets])
    assert found.family == "krea2" and found.metadata["modelspec.architecture"] == "krea-2/lora"
    assert_same(fit(found.state, targets), state)


DIALECTS: dict[str, tuple[Any, Any]] = {
    **{"diffusers": (peft("transformer."), dict), "peft": (peft("base_model.model.", "default"), dict)},
    **{"ai-toolkit": (peft("diffusion_model."), native), "musubi": (kohya("diffusion_model.", str), native)},
    **{"kohya of ComfyUI": (kohya("lora_unet_"), native), "kohya": (kohya("lora_unet_"), dict)},
    **{"SimpleTuner": (kohya("lycoris_"), dict), "no number": (peft("transformer."), without_number)},
    "DiffSynth": (peft("", "default"), native),
}


@pytest.mark.parametrize("wanted", [None, "krea2"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read_exactly(dialect: str, wanted: str | None, model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    written, names = DIALECTS[dialect]
    found = load_lora(foreign(tmp_path / "a.safetensors", written(names(state))), [t.name for t in targets], wanted)
    assert found.family == "krea2"
    assert_same(fit(found.state, targets), state)


def test_alpha_is_folded(model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    tensors = kohya("diffusion_model.", str)(native(state))
    tensors |= {key.replace("lora_down.weight", "alpha"): torch.tensor(1.5) for key in tensors if "lora_down" in key}
    found = load_lora(foreign(tmp_path / "a.safetensors", tensors), [t.name for t in targets], "krea2")
    for name, (a, b) in state.items():
        torch.testing.assert_close(found.state[name][1] @ found.state[name][0], 1.5 / len(a) * b @ a, msg=name)


@pytest.mark.parametrize(
    "layer",
    [
        *("transformer_blocks.7.attn.to_gate", "transformer_blocks.7.ff.up", "text_fusion.projector"),
        *("text_fusion.refiner_blocks.1.attn.to_q", "blocks.7.attn.wq", "blocks.7.attn.gate", "blocks.7.mlp.down"),
        *("txtfusion.layerwise_blocks.0.mlp.gate", "tproj.1", "txtmlp.3", "time_mod_proj"),
    ],
)
def test_a_layer_of_krea_2_alone_decides(layer: str) -> None:
    for key in (f"diffusion_model.{layer}.lora_A.weight", f"lora_unet_{layer.replace('.', '_')}.lora_down.weight"):
        assert {family_of_keys([key], wanted) for wanted in (None, *FAMILIES)} == {"krea2"}, key


def test_attention_alone_is_the_wanted_familys() -> None:
    for layer in ("to_q", "to_k", "to_out.0", "to_out"):
        keys = [f"transformer.transformer_blocks.0.attn.{layer}.lora_A.weight"]
        assert [family_of_keys(keys, name) for name in ("krea2", "qwen_image", "sd3")] == ["krea2", "qwen_image", "sd3"]


@pytest.mark.parametrize("layer", ["to_k", "to_v"])
def test_attention_with_fewer_heads_of_keys_than_of_queries_is_told_by_its_shapes(layer: str) -> None:
    """Of Krea 2's 6144 channels 1536 are keys; of other families' with these names all are."""
    a, b = (f"transformer.transformer_blocks.0.attn.{layer}.lora_{part}.weight" for part in "AB")
    shared, square = ({a: (16, 6144), b: (outputs, 16)} for outputs in (1536, 6144))
    assert {family_of_keys([a, b], wanted, shared) for wanted in (None, *FAMILIES)} == {"krea2"}
    assert family_of_keys([a, b], None, square) == "sd3" and family_of_keys([a, b], "krea2", square) == "krea2"


def test_another_familys_file_is_refused_both_ways(model: tuple, tmp_path: Path) -> None:
    save_lora(path := tmp_path / "a.safetensors", model[2], "krea2")
    for wanted in ("qwen_image", "flux2", "anima", "sd3"):
        with pytest.raises(OneStepError, match="is a LoRA for the transformer of Krea 2, but this model is"):
            load_lora(path, family=wanted)
    a, b = torch.ones(2, 8), torch.ones(8, 2)
    for layer, whose in (
        ("transformer.transformer_blocks.0.img_mlp.net.2", "the transformer of Qwen-Image"),
        ("diffusion_model.blocks.0.mlp.layer1", "the transformer of Anima"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "the transformer of Flux"),
    ):
        other = foreign(tmp_path / "b.safetensors", {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b})
        with pytest.raises(OneStepError, match=f"is a LoRA for {whose}, but this .* of Krea 2"):
            load_lora(other, family="krea2")


def test_attention_and_feed_forwards_are_chosen_by_name(model: tuple) -> None:
    _, targets, _ = model
    names = {which: [target.name for target in select(targets, which)] for which in ("attention", "attention+mlp")}
    assert len(names["attention"]) == 5 * 6 and len(names["attention+mlp"]) == 8 * 6
    assert all(".attn." in name for name in names["attention"])
