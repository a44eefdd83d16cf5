"""LoRA files of Lumina 2: one for each host, both read to the bit; every dialect that is met; Z-Image's, whose layers
have the same names, told by their widths; NewBie refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_networks as small
import torch
from lora_dialects import Factors, flat, kohya, peft
from lora_files import assert_same, case, foreign
from torch import Tensor, nn

from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES, detect
from onestep.core.lora_file import fit, load_lora, save_lora
from onestep.core.lora_keys import family_of_keys
from onestep.core.lora_second import second_file
from onestep.core.tensor_file import read_header

QKV = "layers.0.attention.qkv"


@pytest.fixture(scope="module")
def model() -> tuple[object, list[Any], Factors]:
    return case("lumina2")  # type: ignore[return-value]


def in_comfy(state: Factors) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of each of ComfyUI's layers, by hand: queries, keys and values below one another, each from its own
    third of the rank."""
    pairs = {f"feed_forward.linear_{n}": f"feed_forward.w{n}" for n in (1, 2, 3)}
    pairs |= {"norm1.linear": "adaLN_modulation.1", "attn.to_out.0": "attention.out"}
    outside = {"caption_embedder.1": "cap_embedder.1", "timestep_embedder.linear_1": "t_embedder.mlp.0"}
    outside |= {"timestep_embedder.linear_2": "t_embedder.mlp.2"}
    outside = {f"time_caption_embed.{ours}": theirs for ours, theirs in outside.items()}
    outside |= {"norm_out.linear_1": "final_layer.adaLN_modulation.1", "norm_out.linear_2": "final_layer.linear"}
    found = {}
    for name, (a, b) in state.items():
        block, _, layer = name.partition(".0.") if name.startswith(("noise", "context")) else ("", "", "")
        if name.startswith("layers."):
            block, layer = name[:8], name[9:]
        else:
            block = f"{block}.0" if block else ""
        if layer in pairs:
            found[f"{block}.{pairs[layer]}"] = (a, b)
        elif layer == "attn.to_q":
            (k, down_k), (v, down_v) = (state[f"{block}.attn.to_{letter}"] for letter in "kv")
            whole, rank = torch.zeros(len(b) + 2 * len(down_k), 3 * len(a)), len(a)
            whole[: len(b), :rank] = b
            whole[len(b) : len(b) + len(down_k), rank : 2 * rank] = down_k
            whole[len(b) + len(down_k) :, 2 * rank :] = down_v
            found[f"{block}.attention.qkv"] = (torch.cat([a, k, v]), whole)
        elif not layer:
            found[outside.get(name, name)] = (a, b)
    return found


@pytest.mark.parametrize("host", ["diffusers", "comfyui"])
def test_either_file_is_read_again_to_the_bit(host: Any, model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    save_lora(path := tmp_path / "a.safetensors", state, "lumina2", host=host)
    found = load_lora(path, [target.name for target in targets])
    assert found.family == "lumina2" and found.metadata["modelspec.architecture"] == "lumina-2/lora"
    assert_same(fit(found.state, targets), state)
    save_lora(again := tmp_path / "b.safetensors", found.state, "lumina2", host=host)
    assert_same(load_lora(again).state, state)


def test_each_hosts_file_has_its_own_keys_and_shapes(model: tuple, tmp_path: Path) -> None:
    """ComfyUI's: nothing of diffusers' paths, queries, keys and values one layer of three times the rank; no alpha."""
    _, _, state = model
    expected = {"diffusers": peft("transformer.")(state), "comfyui": peft("diffusion_model.")(in_comfy(state))}
    for host, tensors in expected.items():
        save_lora(path := tmp_path / f"{host}.safetensors", state, "lumina2", host=host)  # type: ignore[arg-type]
        written = read_header(path).tensors
        assert {name: list(entry.shape) for name, entry in written.items()} == {
            name: list(value.shape) for name, value in tensors.items()
        }


def test_what_is_zero_is_read_again_too(model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    untrained = {name: (a, torch.zeros_like(b)) for name, (a, b) in state.items()}
    save_lora(path := tmp_path / "a.safetensors", untrained, "lumina2", host="comfyui")
    assert_same(fit(load_lora(path).state, targets), untrained)


def test_part_of_a_fused_layer_is_refused_for_comfyui(model: tuple, tmp_path: Path) -> None:
    part = {name: factors for name, factors in model[2].items() if not name.endswith("to_k")}
    with pytest.raises(OneStepError, match=r"in one layer, and layers\.0\.attn\.to_k is not adapted"):
        save_lora(tmp_path / "a.safetensors", part, "lumina2", host="comfyui")


def test_the_second_file_says_whose_it_is(tmp_path: Path) -> None:
    path = tmp_path / "anna.safetensors"
    names = [second_file(path, "lumina2", host) for host in ("comfyui", "diffusers")]  # type: ignore[arg-type]
    assert [file.name for file in names if file] == ["anna_diffusers.safetensors", "anna_comfyui.safetensors"]
    assert second_file(path, "z_image", "comfyui") is None


DIALECTS = {
    **{"diffusers": peft("transformer."), "peft": peft("base_model.model.", "default"), "kohya": kohya("lora_unet_")},
    "ai-toolkit": lambda state: peft("diffusion_model.")(in_comfy(state)),
    "sd-scripts": lambda state: kohya("lora_unet_")(in_comfy(state)),
    "musubi": lambda state: kohya("lycoris_")(in_comfy(state)),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read_exactly(dialect: str, model: tuple, tmp_path: Path) -> None:
    _, targets, state = model
    path = foreign(tmp_path / "a.safetensors", DIALECTS[dialect](state))
    found = load_lora(path, [target.name for target in targets])
    assert found.family == "lumina2"
    assert_same(fit(found.state, targets), state)


@pytest.mark.parametrize("name", [f"diffusion_model.{QKV}", f"lora_unet_{flat(QKV)}"])
@pytest.mark.parametrize("rank", [4, 6])
def test_a_fused_projection_that_was_trained_as_one_comes_apart(
    name: str, rank: int, model: tuple, tmp_path: Path
) -> None:
    """Rows as wide as the layer's input, and two of a third of it, each with the whole A; Z-Image's are others."""
    _, targets, _ = model
    draw = torch.Generator().manual_seed(4)
    a, b = torch.randn(rank, 96, generator=draw), torch.randn(160, rank, generator=draw)
    path = foreign(tmp_path / "a.safetensors", {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b})
    found = load_lora(path, [target.name for target in targets])
    rows = dict(zip("qkv", b.split([96, 32, 32]), strict=True))
    assert found.family == "lumina2"
    assert_same(found.state, {f"layers.0.attn.to_{letter}": (a, part) for letter, part in rows.items()})


@pytest.mark.parametrize("rows", [(160, "lumina2"), (288, "z_image")])
def test_the_width_of_a_fused_layer_tells_whose_a_file_is(rows: tuple[int, str], tmp_path: Path) -> None:
    keys = {f"diffusion_model.{QKV}.lora_A.weight": torch.ones(2, 96)}
    keys[f"diffusion_model.{QKV}.lora_B.weight"] = torch.ones(rows[0], 2)
    path = foreign(tmp_path / "a.safetensors", keys)
    assert load_lora(path).family == rows[1]
    other = {"lumina2": "z_image", "z_image": "lumina2"}[rows[1]]
    with pytest.raises(OneStepError, match=f"is a LoRA for {FAMILIES[rows[1]].title}, but this model is"):
        load_lora(path, family=other)


@pytest.mark.parametrize("layer", ["attn.to_q", "norm1.linear", "feed_forward.linear_2", "adaLN_modulation.1"])
def test_a_layer_that_is_its_own_decides(layer: str) -> None:
    for path in (f"layers.7.{layer}", f"noise_refiner.0.{layer}"):
        for key in (f"transformer.{path}.lora_A.weight", f"lora_unet_{flat(path)}.lora_down.weight"):
            assert {family_of_keys([key], wanted) for wanted in (None, *FAMILIES)} == {"lumina2"}, key


def test_what_both_have_is_the_wanted_familys() -> None:
    keys = ["diffusion_model.layers.3.attention.out.lora_A.weight"]
    assert [family_of_keys(keys, name) for name in ("lumina2", "z_image")] == ["lumina2", "z_image"]


def test_newbies_file_and_network_are_refused_by_name(tmp_path: Path) -> None:
    for layer in ("clip_text_pooled_proj.1", "time_text_embed.1"):
        keys = {f"diffusion_model.{layer}.lora_{letter}.weight": torch.ones(2, 2) for letter in "AB"}
        with pytest.raises(OneStepError, match="This LoRA is for NewBie"):
            load_lora(foreign(tmp_path / "a.safetensors", keys))
    network: Any = small.network_of("lumina2")
    network.clip_text_pooled_proj = nn.Linear(2, 2)
    with pytest.raises(OneStepError, match=r"^NewBie models cannot be adapted yet: use .*Lumina 2"):
        detect(network)
