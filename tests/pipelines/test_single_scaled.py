"""Single files in scaled fp8: the numbers that they stand for, in the room that they take; what is broken is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import narrowed
from safetensors.torch import load_file, save_file
from single_checkpoints import checkpoint
from torch import Tensor

import onestep
from onestep.core.errors import OneStepError
from onestep.core.stored import STORED
from onestep.pipelines.adapt import adapt
from onestep.pipelines.load import half_of, refuse_broken
from onestep.pipelines.single_file import FIRST, load_single_file

State = dict[str, Tensor]
UNET, CLIP = "model.diffusion_model.", "cond_stage_model.transformer."
LAYER = UNET + "input_blocks.3.1.transformer_blocks.0.attn1.to_q"
FEW: dict[str, Any] = {"method": "regression", "steps": 2, "batch": 2, "pairs": 2, "teacher_steps": 2, "rank": 2}
FEW |= {"sizes": "64x64", "watch_every": 0, "preview_every": 0, "checkpointing": True}


def is_layer(key: str, weight: Tensor, roots: tuple[str, ...]) -> bool:
    return key.startswith(roots) and key.endswith(".weight") and weight.ndim in (2, 4) and "embedding" not in key


def quantised(
    weight: Tensor, kind: torch.dtype = torch.float8_e4m3fn, rows: bool = False, gain: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Q and s, whose product is the weight as near as fp8 is."""
    flat = weight.float().flatten(1).abs()
    scale = gain * (flat.amax(1) if rows else flat.amax()).clamp_min(1e-6) / torch.finfo(kind).max
    return (weight.float() / scale.reshape(-1, *[1] * (weight.ndim - 1)) if rows else weight.float() / scale).to(
        kind
    ), scale


def older(state: State) -> dict[str, str]:
    """scaled_fp8 and scale_weight, in the U-Net and in the text encoder."""
    for key in [key for key, weight in state.items() if is_layer(key, weight, (UNET, CLIP))]:
        state[key], state[key.removesuffix("weight") + "scale_weight"] = quantised(state[key])
        state[key.removesuffix("weight") + "scale_input"] = torch.tensor(0.5)
    for root in (UNET, CLIP):
        state[root + "scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    return {}


def marked(state: State) -> dict[str, str]:
    """weight_scale, a row each, and comfy_quant; some layers alone, in e5m2."""
    mark = torch.tensor(list(json.dumps({"format": "float8_e5m2"}).encode()), dtype=torch.uint8)
    for key in [key for key, weight in state.items() if is_layer(key, weight, (UNET,)) and "attn" in key]:
        layer = key.removesuffix("weight")
        state[key], state[layer + "weight_scale"] = quantised(state[key], torch.float8_e5m2, rows=True)
        state[layer + "comfy_quant"] = mark.clone()
    return {}


def in_header(state: State) -> dict[str, str]:
    """The formats in the header."""
    keys = [key for key, weight in state.items() if is_layer(key, weight, (UNET,)) and ".emb_layers." not in key]
    for key in keys:
        state[key], state[key.removesuffix("weight") + "weight_scale"] = quantised(state[key])
    layers = {key.removesuffix(".weight"): {"format": "float8_e4m3fn"} for key in keys}
    return {"_quantization_metadata": json.dumps({"layers": layers})}


def plain(state: State) -> dict[str, str]:
    """Every number as it is, without a scale."""
    state.update({key: value.to(torch.float8_e4m3fn) for key, value in state.items() if key.startswith(UNET)})
    return {}


KINDS: dict[str, Callable[[State], dict[str, str]]] = {f.__name__: f for f in (older, marked, in_header, plain)}


@dataclass(frozen=True)
class Whole:
    """A tiny pipeline, its single file's tensors, and its configurations."""

    pipe: Any
    state: State
    configs: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    @cache
    def made(layout: str) -> Whole:
        pipe, file, configs = checkpoint(layout, tmp_path_factory.mktemp(layout))
        return Whole(pipe, load_file(file), configs)

    return made


def written(state: State, change: Callable[[State], Any], folder: Path) -> Path:
    """The file of the tensors, changed; beside it twin.safetensors, of the numbers that it stands for."""
    state = {key: value.clone() for key, value in state.items()}
    told = change(state)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "x.safetensors", told or None)
    twin: State = {}
    for key, value in state.items():
        layer = key.removesuffix("weight")
        scale = state.get(layer + "scale_weight", state.get(layer + "weight_scale"))
        if (
            scale is not None
            and key.endswith(".weight")
            and scale.is_floating_point()
            and scale.numel() in (1, len(value))
        ):
            value = value.float() * (scale.reshape(-1, *[1] * (value.ndim - 1)) if scale.numel() > 1 else scale)
        twin[key] = value.float() if value.is_floating_point() else value
    beside = ("scaled_fp8", "scale_weight", "weight_scale", "scale_input", "comfy_quant")
    save_file({key: value for key, value in twin.items() if not key.endswith(beside)}, folder / "twin.safetensors")
    return folder / "x.safetensors"


FILES = [(layout, kind) for layout in ("sd15", "sdxl") for kind in KINDS]


@pytest.mark.parametrize(("layout", "kind"), narrowed(FILES, *FILES[: len(KINDS)]))
def test_a_file_loads_as_the_numbers_that_it_stands_for(kind: str, layout: str, whole: Any, tmp_path: Path) -> None:
    """Where nothing is to stay stored, every tensor of every part is the twin's."""
    file = written(whole(layout).state, KINDS[kind], tmp_path)
    paths = file, file.with_name("twin.safetensors")
    loaded, twin = (load_single_file(path, torch.float32, whole(layout).configs) for path in paths)
    for name in ("unet", "vae", "text_encoder"):
        theirs = getattr(twin, name).state_dict()
        for key, value in getattr(loaded, name).state_dict().items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-6, atol=0)


def loaded(file: Path, whole: Whole) -> Any:
    """The pipeline with the tokenizer of its own, which is as short as its tiny encoder."""
    pipe = load_single_file(file, torch.float32, whole.configs, stored=True)
    pipe.tokenizer = whole.pipe.tokenizer
    return pipe


@pytest.mark.parametrize("kind", narrowed(KINDS, "older", "marked"))
def test_its_blocks_stay_in_fp8_and_learn_what_the_twin_learns(kind: str, whole: Any, tmp_path: Path) -> None:
    """D of a student and every gradient, against the dequantised twin; the weights keep their room."""
    file = written(whole("sd15").state, KINDS[kind], tmp_path)
    hosts: list[Any] = [adapt(loaded(path, whole("sd15"))) for path in (file, file.with_name("twin.safetensors"))]
    found: list[Any] = []
    draw = torch.Generator().manual_seed(0)
    x, sigma = torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([0.9, 0.4], dtype=torch.float64)
    for host in hosts:
        roles, cond = host.denoiser.roles, host.encode(["a red cat", "a wall"], (64, 64))
        roles.add("student", 3, 0)
        steady = torch.Generator().manual_seed(1)
        for _, b in roles.state("student").values():
            b.copy_(torch.randn(b.shape, generator=steady) * 0.1)
        with roles.use("student"):
            y = host.denoiser(x, sigma, cond)
        found.append((y.detach(), torch.autograd.grad(y.square().sum(), roles.parameters("student"))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()) + 1e-6)
    kept = [layer for layer in hosts[0].network.modules() if type(layer) in STORED.values()]
    assert len(kept) > 10 and all(layer.weight.dtype.itemsize == 1 for layer in kept)
    assert hosts[0].network.dtype == torch.float32 and hosts[0].base_hash != hosts[1].base_hash


def test_a_run_on_a_scaled_file_leaves_a_lora(whole: Any, tmp_path: Path) -> None:
    pipe = loaded(written(whole("sd15").state, older, tmp_path), whole("sd15"))
    result = onestep.distill(pipe, ["a cat"], out=tmp_path / "run", **FEW)
    assert result.path.is_file() and "loads all" in result.check


def changed(edit: Callable[[State], Any], base: Callable[[State], Any] = older) -> Callable[[State], Any]:
    def change(state: State) -> Any:
        told = base(state)
        return edit(state) or told

    return change


def put(key: str, value: Any) -> Callable[[State], Any]:
    return lambda state: state.update({key: value})


def other_format(name: str) -> Callable[[State], Any]:
    mark = torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)
    return put(LAYER + ".comfy_quant", mark)


REFUSED: dict[str, tuple[Callable[[State], Any], str]] = {
    "no scale": (
        changed(lambda state: state.pop(LAYER + ".scale_weight") and None),
        r"to_q.weight is scaled fp8, and its scale is missing",
    ),
    "no scale beside a mark": (
        changed(lambda state: state.pop(LAYER + ".weight_scale") is None or None, marked),
        "its scale is missing",
    ),
    "a scale of nothing": (
        changed(put(UNET + "input_blocks.99.0.scale_weight", torch.tensor(1.0))),
        "holds .*input_blocks.99.0.scale_weight without .*input_blocks.99.0.weight",
    ),
    "a scale beside a plain weight": (
        put(LAYER + ".scale_weight", torch.tensor(1.0)),
        "to_q.weight has a scale of fp8, and is torch.float32",
    ),
    "a scale of another shape": (
        changed(put(LAYER + ".scale_weight", torch.ones(3))),
        r"scale_weight as torch.float32 \[3\], where one number belongs, or one for each of",
    ),
    "scales of blocks": (changed(put(LAYER + ".weight_scale", torch.ones(4, 4)), marked), r"\[4, 4\], where one"),
    "a scale in whole numbers": (
        changed(put(LAYER + ".scale_weight", torch.ones((), dtype=torch.int32))),
        "torch.int32",
    ),
    "NaN": (changed(put(LAYER + ".scale_weight", torch.tensor(float("nan")))), "not a finite number above 0"),
    "infinite": (changed(put(LAYER + ".scale_weight", torch.tensor(float("inf")))), "not a finite number above 0"),
    "zero": (changed(put(LAYER + ".scale_weight", torch.tensor(0.0))), "not a finite number above 0"),
    "negative": (changed(put(LAYER + ".scale_weight", torch.tensor(-1.0))), "not a finite number above 0"),
    "another format": (changed(other_format("nvfp4"), marked), "in the format 'nvfp4', which is not served"),
    "the other fp8": (changed(other_format("float8_e4m3fn"), marked), "has a scale of fp8, and is torch.float8_e5m2"),
    "an unreadable mark": (
        changed(put(LAYER + ".comfy_quant", torch.zeros(5, dtype=torch.uint8)), marked),
        "in a way that cannot be read",
    ),
    "an unreadable header": (lambda state: {"_quantization_metadata": "{"}, "in a way that cannot be read"),
    "a header without formats": (
        lambda state: {"_quantization_metadata": json.dumps({"layers": {LAYER: 3}})},
        "in a way that cannot be read",
    ),
    "scales of scales": (put(LAYER + ".weight_scale_2", torch.tensor(1.0)), "its weights are quantised"),
    "a codebook": (put(LAYER + ".weight_codebook", torch.zeros(16)), "its weights are quantised"),
    "smoothed inputs": (put(LAYER + ".pre_quant_scale", torch.ones(4)), "its weights are quantised"),
    "NaN in a weight": (
        changed(lambda state: state[LAYER + ".weight"].view(torch.uint8).fill_(0x7F) is None or None),
        "holds numbers that are not finite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_broken_or_quantised_otherwise_is_refused_by_name(case: str, whole: Any, tmp_path: Path) -> None:
    change, why = REFUSED[case]
    file = written(whole("sd15").state, change, tmp_path)
    for stored in (False, True):
        with pytest.raises(OneStepError, match=why) as caught:
            refuse_broken(load_single_file(file, torch.float32, whole("sd15").configs, stored=stored), file)
        assert file.name in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("keys", "whose"),
    [
        (("head.modulation", "time_projection.1.weight"), "a Wan checkpoint"),
        (("llm_adapter.x.weight", "blocks.0.adaln_modulation_mlp.1.weight"), "an Anima checkpoint"),
        (("noise_refiner.0.x.weight", "cap_embedder.1.weight"), "a Lumina 2 checkpoint"),
        (("transformer_blocks.0.x.weight", "txt_norm.weight"), "a Qwen-Image checkpoint"),
        (("t_block.1.weight", "y_embedder.y_embedding"), "a PixArt-Sigma checkpoint"),
        (("double_blocks.0.x.weight", "distilled_guidance_layer.x.weight"), "a Chroma checkpoint"),
    ],
)
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8_tensorwise"])
def test_another_models_is_told_by_name_however_it_is_stored(
    keys: tuple[str, str], whose: str, kind: str, tmp_path: Path
) -> None:
    state = {
        "blocks.0.attn.q.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn),
        **{key: torch.zeros(2) for key in keys},
    }
    state["blocks.0.attn.q.weight_scale"] = torch.ones(())
    state["blocks.0.attn.q.comfy_quant"] = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(OneStepError, match=f"x.safetensors is {whose}, .*diffusers folder.*or use ComfyUI"):
        load_single_file(tmp_path / "x.safetensors", torch.float32, stored=True)


def test_a_truncated_file_is_refused(whole: Any, tmp_path: Path) -> None:
    file = written(whole("sd15").state, older, tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OneStepError, match="it is cut off"):
        load_single_file(file, torch.float32, whole("sd15").configs, stored=True)


@pytest.mark.parametrize(
    ("stored", "bfloat16", "wanted"),
    [
        (torch.float16, True, torch.float16),
        (torch.float32, True, torch.float16),
        (torch.float8_e4m3fn, True, torch.float16),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float16),
    ],
)
def test_a_card_takes_a_unet_in_float16_unless_it_is_stored_in_bfloat16(
    stored: torch.dtype, bfloat16: bool, wanted: torch.dtype, tmp_path: Path
) -> None:
    first = torch.zeros(4, 4, 3, 3).to(stored)
    save_file({FIRST: first}, tmp_path / "x.safetensors")
    (tmp_path / "folder" / "unet").mkdir(parents=True)
    save_file({"conv_in.weight": first}, tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    assert half_of(tmp_path / "x.safetensors", bfloat16) == half_of(tmp_path / "folder", bfloat16) == wanted


def test_a_card_takes_all_else_in_bfloat16_where_it_has_that(tmp_path: Path) -> None:
    assert half_of(tmp_path, True) == torch.bfloat16 and half_of(tmp_path, False) == torch.float16
