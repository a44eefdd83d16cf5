"""LoRA files: ours byte for byte, those of others exactly, broken and foreign ones refused with a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import small_networks as small
import torch
from diffusers import DDIMScheduler, FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers import FlowMatchEulerDiscreteScheduler as FlowScheduler
from diffusers import StableDiffusionXLPipeline as SDXLPipeline
from torch import Tensor, nn

from onestep.core.errors import OneStepError
from onestep.core.families import bind_diffusers
from onestep.core.lora_file import LoraFile, fit, load_lora, save_lora
from onestep.core.tensor_file import read_header

State = dict[str, tuple[Tensor, Tensor]]
DOUBLE, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0"
SINGLE_PARTS = [*(f"{SINGLE}.attn.to_{x}" for x in "qkv"), f"{SINGLE}.proj_mlp"]
BLOCK, BLOCK_ = "transformer_blocks.3", "transformer_blocks_3"


def case(name: str) -> tuple[nn.Module, Any, State]:
    network = small.network_of(name, torch.float32)
    targets = bind_diffusers(network)
    return network, targets, small.random_state(targets)


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, factors in expected.items():
        assert all(torch.equal(f, e) and f.shape == e.shape for f, e in zip(found[name], factors, strict=True)), name


def foreign(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A file as others write it: by safetensors' own writer."""
    safetensors.torch.save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path, metadata)
    return path


def factors(rank: int = 4, inputs: int = 8, outputs: int = 8, seed: int = 5) -> tuple[Tensor, Tensor]:
    draw = small.seeded(seed)
    return draw(rank, inputs).float(), draw(outputs, rank).float()


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


@pytest.mark.parametrize("name", small.CASES)
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
    none |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    if name == "sdxl":
        return SDXLPipeline(**none, unet=network, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False))
    if name == "flux":
        return FluxPipeline(**none, transformer=network, scheduler=FlowScheduler())
    none |= dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    return StableDiffusion3Pipeline(**none, transformer=network, scheduler=FlowScheduler())


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


# Those of others: their name of a layer -> ours

SAME_LAYER = [
    ("lora_unet_down_blocks_0_attentions_1_proj_in", "down_blocks.0.attentions.1.proj_in"),
    (f"lora_unet_input_blocks_4_1_{BLOCK_}_attn1_to_q", f"down_blocks.1.attentions.0.{BLOCK}.attn1.to_q"),
    (f"lora_unet_output_blocks_5_1_{BLOCK_}_ff_net_2", f"up_blocks.1.attentions.2.{BLOCK}.ff.net.2"),
    ("lora_unet_output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
    ("lora_unet_middle_block_2_out_layers_3", "mid_block.resnets.1.conv2"),
    ("lora_unet_input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
    ("lora_unet_label_emb_0_0", "add_embedding.linear_1"),
    ("diffusion_model.input_blocks.1.1.proj_in", "down_blocks.0.attentions.0.proj_in"),
    (f"unet.mid_block.attentions.0.{BLOCK}.attn2.to_k", f"mid_block.attentions.0.{BLOCK}.attn2.to_k"),
    ("unet.base_model.model.mid_block.attentions.0.proj_out", "mid_block.attentions.0.proj_out"),
    ("base_model.model.time_embedding.linear_1", "time_embedding.linear_1"),
    ("lycoris_up_blocks_1_resnets_0_conv1", "up_blocks.1.resnets.0.conv1"),
    ("transformer.transformer_blocks.0.attn.to_q", f"{DOUBLE}.to_q"),
    ("lora_transformer_transformer_blocks_0_attn_to_out_0", f"{DOUBLE}.to_out.0"),
    ("lora_unet_double_blocks_0_img_attn_proj", f"{DOUBLE}.to_out.0"),
    ("lora_unet_single_blocks_0_linear2", f"{SINGLE}.proj_out"),
    ("transformer.single_transformer_blocks.0.proj_mlp", f"{SINGLE}.proj_mlp"),
    ("diffusion_model.joint_blocks.0.x_block.mlp.fc1", "transformer_blocks.0.ff.net.0.proj"),
]  # fmt: skip
SUFFIXES = [
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
]


@pytest.mark.parametrize(("theirs", "ours"), SAME_LAYER)
@pytest.mark.parametrize(("down", "up"), SUFFIXES)
def test_names_of_other_trainers(theirs: str, ours: str, down: str, up: str, tmp_path: Path) -> None:
    a, b = factors()
    path = foreign(tmp_path / "a.safetensors", {theirs + down: a, theirs + up: b})
    inside_a_block = "blocks" in theirs or "block_" in theirs or "unet." in theirs or "mid" in theirs
    assert_same(load_lora(path, family=None if inside_a_block else "unet").state, {ours: (a, b)})


def test_names_of_old_diffusers(tmp_path: Path) -> None:
    a, b = factors()
    block = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor"
    names = {f"{block}.to_out_lora.down.weight": a, f"{block}.to_out_lora.up.weight": b}
    loaded = load_lora(foreign(tmp_path / "a.safetensors", names))
    assert_same(loaded.state, {"mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": (a, b)})


def test_blocks_of_an_unusual_unet_are_counted_by_its_own_names(tmp_path: Path) -> None:
    """With one residual block a level, input_blocks.3 is the second level's first block."""
    a, b = factors()
    tensors = {
        "lora_unet_input_blocks_3_1_proj_in.lora_A.weight": a,
        "lora_unet_input_blocks_3_1_proj_in.lora_B.weight": b,
    }
    path = foreign(tmp_path / "a.safetensors", tensors)
    names = [*(f"down_blocks.{i}.resnets.0.conv1" for i in (0, 1)), *(f"up_blocks.{i}.resnets.1.conv1" for i in (0, 1))]
    names.append("down_blocks.1.attentions.0.proj_in")
    assert list(load_lora(path, names).state) == ["down_blocks.1.attentions.0.proj_in"]


FUSED = [
    ("flux", "lora_unet_double_blocks_0_img_attn_qkv", [f"{DOUBLE}.to_{x}" for x in "qkv"], (8, 8, 8)),
    ("flux", "diffusion_model.double_blocks.0.txt_attn.qkv", [f"{DOUBLE}.add_{x}_proj" for x in "qkv"], (8, 8, 8)),
    ("flux", "lora_unet_single_blocks_0_linear1", SINGLE_PARTS, (8, 8, 8, 32)),
    ("flux", "diffusion_model.single_blocks.0.linear1", SINGLE_PARTS, (8, 8, 8, 20)),
    ("flux", "diffusion_model.single_blocks.0.linear1_qkv", SINGLE_PARTS[:3], (8, 8, 8)),
    ("sd3", "diffusion_model.joint_blocks.0.x_block.attn.qkv", [f"{DOUBLE}.to_{x}" for x in "qkv"], (8, 8, 8)),
    ("sd3", "lora_unet_joint_blocks_0_context_block_attn_qkv", [f"{DOUBLE}.add_{x}_proj" for x in "qkv"], (8, 8, 8)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "theirs", "ours", "widths"), FUSED)
def test_fused_layers_come_apart_exactly(
    family: str, theirs: str, ours: list[str], widths: tuple[int, ...], tmp_path: Path
) -> None:
    a, b = factors(outputs=sum(widths))
    path = foreign(tmp_path / "a.safetensors", {f"{theirs}.lora_down.weight": a, f"{theirs}.lora_up.weight": b})
    loaded = load_lora(path)
    assert loaded.family == family
    rows = b.split(widths)
    assert_same(loaded.state, {name: (a, part) for name, part in zip(ours, rows, strict=True)})


def test_a_fused_layer_of_another_width_is_refused(tmp_path: Path) -> None:
    a, b = factors(outputs=25)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    path = foreign(tmp_path / "a.safetensors", {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b})
    with pytest.raises(OneStepError, match="25 outputs"):
        load_lora(path)


def test_the_final_modulation_returns_to_diffusers_order(tmp_path: Path) -> None:
    a, b = factors(outputs=16)
    tensors = {
        "diffusion_model.final_layer.adaLN_modulation.1.lora_A.weight": a,
        "diffusion_model.final_layer.adaLN_modulation.1.lora_B.weight": b,
        "diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.lora_A.weight": a,
        "diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.lora_B.weight": b,
        "diffusion_model.joint_blocks.1.x_block.adaLN_modulation.1.lora_A.weight": a,
        "diffusion_model.joint_blocks.1.x_block.adaLN_modulation.1.lora_B.weight": b,
    }
    shift, scale = b.chunk(2)
    swapped = torch.cat([scale, shift])
    state = load_lora(foreign(tmp_path / "a.safetensors", tensors)).state
    expected = {"norm_out.linear": (a, swapped), "transformer_blocks.0.norm1_context.linear": (a, swapped)}
    assert_same(state, {**expected, "transformer_blocks.1.norm1.linear": (a, b)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_alpha_is_folded_into_b(dtype: torch.dtype, tmp_path: Path) -> None:
    a, b = (factor.to(dtype) for factor in factors(rank=4))
    key = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(1.0, dtype=dtype)}
    state = load_lora(foreign(tmp_path / "a.safetensors", tensors)).state
    assert_same(state, {"mid_block.attentions.0.proj_in": (a.float(), b.float() / 4)})


def test_alpha_in_pefts_settings_is_folded_into_b(tmp_path: Path) -> None:
    a, b = factors(rank=4)
    tensors, name = {}, "proj_out"
    for layer in (f"{DOUBLE}.to_q", name):
        tensors |= {f"transformer.{layer}.lora_A.weight": a, f"transformer.{layer}.lora_B.weight": b}
    settings = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {name: 2}}
    path = foreign(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(settings)})
    assert_same(load_lora(path).state, {f"{DOUBLE}.to_q": (a, b * 2), name: (a, b / 2)})


def test_text_encoders_are_named_as_unused(tmp_path: Path) -> None:
    a, b = factors()
    tensors = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": a}
    tensors |= {"lora_unet_conv_in.lora_down.weight": a, "lora_unet_conv_in.lora_up.weight": b}
    loaded = load_lora(foreign(tmp_path / "a.safetensors", tensors), family="unet")
    assert loaded.unused == ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",)
    assert list(loaded.state) == ["conv_in"]


def test_one_by_one_convolutions_and_linears_hold_the_same_numbers() -> None:
    _, targets, state = case("sd15")
    flat = {name: (a.flatten(1) if a.shape[2:].numel() == 1 else a, b.flatten(1)) for name, (a, b) in state.items()}
    fitted = fit(flat, targets)
    assert_same(fitted, state)


# Refused


def broken_files(tmp_path: Path) -> dict[str, str]:
    """Writes files that are none; their names, with a word that the refusal must hold."""
    _, _, state = case("sd15")
    good = tmp_path / "good.safetensors"
    save_lora(good, state, "unet")
    raw = good.read_bytes()
    torch.save({"a": torch.zeros(2)}, tmp_path / "zipped.safetensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    (tmp_path / "named.ckpt").write_bytes(raw)
    (tmp_path / "cut.safetensors").write_bytes(raw[:-5])
    (tmp_path / "head.safetensors").write_bytes(raw[:100])
    (tmp_path / "longer.safetensors").write_bytes(raw + b"x")
    (tmp_path / "text.safetensors").write_text("<!DOCTYPE html><html>not found</html>")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "huge.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    (tmp_path / "folder").mkdir()
    words = {"zipped": "pickle", "old": "pickle", "cut": "cut off", "head": "cut off", "longer": "left over"}
    words |= {"text": "header", "empty": "0 bytes", "huge": "header"}
    files = {f"{name}.safetensors": word for name, word in words.items()}
    return {**files, "named.ckpt": "pickle", "folder": "Cannot", "none": "Cannot"}


def test_files_that_are_no_sound_safetensors_are_refused(tmp_path: Path) -> None:
    for name, word in broken_files(tmp_path).items():
        for read in (load_lora, read_header):
            with pytest.raises(OneStepError, match=word) as refused:
                read(tmp_path / name)
            assert len(str(refused.value)) < 400


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
    "known model": "lora_unet_blocks_0_self_attn_q.lora_down.weight",
    "does not have": "lora_unet_down_blocks_0_oddity.lora_down.weight",
    "lacks one": "unet.conv_in.lora_A.weight",
}


@pytest.mark.parametrize("word", OTHER_KINDS)
def test_other_adapters_and_unknown_keys_are_refused_by_name(word: str, tmp_path: Path) -> None:
    a, b = factors()
    tensors = {OTHER_KINDS[word]: a}
    if word != "known model":
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


def test_an_empty_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OneStepError, match="no layer"):
        save_lora(tmp_path / "a.safetensors", {}, "unet")
    assert not list(tmp_path.iterdir())


# Forty headers broken at random


def damage(raw: bytes, seed: int) -> bytes:
    """The file with one random harm to its header; each kind of harm five times with its own numbers."""
    pick = lambda n: int(torch.randint(n, (1,), generator=generator))  # noqa: E731
    generator = torch.Generator().manual_seed(seed)
    length = int.from_bytes(raw[:8], "little")
    text, data = raw[8 : 8 + length], raw[8 + length :]

    def whole(header: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header + data

    def edited(edit: Callable[[dict[str, Any], str], None]) -> bytes:
        header = json.loads(text)
        edit(header, list(header)[pick(len(header))])
        return whole(json.dumps(header).encode())

    nonsense = [None, [], "x", -1, 2**70, 1.5, True, {"shape": 1}, [[]], [-1, 2]]
    structure = [i for i, letter in enumerate(text) if letter in b'{}[]:,"']
    kinds: list[Callable[[], bytes]] = [
        lambda: raw[: pick(8 + length)],
        lambda: (length + 1 + pick(2**30)).to_bytes(8, "little") + raw[8:],
        lambda: whole(bytes((spot := bytearray(text)).__setitem__(structure[pick(len(structure))], 0) or spot)),
        lambda: whole(bytes(torch.randint(256, (length,), generator=generator, dtype=torch.uint8).tolist())),
        lambda: edited(lambda header, name: header[name].update(data_offsets=[pick(9), 10**6 + pick(10**6)])),
        lambda: edited(lambda header, name: header[name].update(shape=[*header[name]["shape"], 2 + pick(9)])),
        lambda: edited(lambda header, name: header[name].update(dtype=nonsense[pick(len(nonsense))])),
        lambda: edited(lambda header, name: header.update({name: nonsense[pick(len(nonsense))]})),
    ]
    return kinds[seed % len(kinds)]()


@pytest.mark.parametrize("seed", range(40))
def test_forty_broken_headers_are_refused_and_nothing_else_happens(seed: int, tmp_path: Path) -> None:
    a, b = factors()
    path = foreign(tmp_path / "a.safetensors", {"unet.conv_in.lora_A.weight": a, "unet.conv_in.lora_B.weight": b})
    path.write_bytes(damage(path.read_bytes(), seed))
    for read in (load_lora, read_header):
        with pytest.raises(OneStepError) as refused:
            read(path)
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b'{"__metadata__":{"a":1}}',
        b'{"__metadata__":{"a":"\\ud800"}}',
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
    ],
)
def test_hostile_headers_are_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(OneStepError):
        read_header(path)


def test_what_is_read_is_a_lora_file(tmp_path: Path) -> None:
    a, b = factors()
    path = foreign(tmp_path / "a.safetensors", {"conv_in.lora_A.weight": a, "conv_in.lora_B.weight": b})
    with pytest.raises(OneStepError, match="known model"):
        load_lora(path)  # the name alone tells no family
    loaded = load_lora(path, family="unet")
    assert isinstance(loaded, LoraFile) and loaded.recipe is None
