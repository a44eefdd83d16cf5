"""Parts of single files, completed by asking the modules for their tensors by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import narrowed
from single_checkpoints import PARTS, changed, checkpoint
from torch import Tensor

from onestep.core.errors import OneStepError
from onestep.pipelines.adapt import adapt
from onestep.pipelines.one_step import OneStepPipeline
from onestep.pipelines.single_file import load_single_file

State = dict[str, Tensor]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, CLIP_XL = "cond_stage_model.transformer.", "conditioner.embedders.0.transformer."
OPEN, OPEN_XL = "cond_stage_model.model.", "conditioner.embedders.1.model."


def renamed(old: str, new: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for key in [key for key in state if key.startswith(old)]:
            state[new + key[len(old) :]] = state.pop(key)

    return change


def with_more(*keys: str) -> Callable[[State], None]:
    return lambda state: state.update({key: torch.ones(3) for key in keys})


def without(*starts: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for key in [key for key in state if key.startswith(starts)]:
            del state[key]

    return change


def unturned(state: State) -> None:
    """transformers' own name of the projection, which is the transpose of open_clip's."""
    state[OPEN_XL + "text_projection.weight"] = state.pop(OPEN_XL + "text_projection").T.contiguous()


def as_convolutions(state: State) -> None:
    """Older tools wrote SDXL's matrices as 1x1 convolutions."""
    for key in [key for key in state if ".proj_in.weight" in key or ".proj_out.weight" in key]:
        state[key] = state[key][..., None, None] if state[key].ndim == 2 else state[key]


def diffusers_attention(state: State) -> None:
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
    for root in (f"{VAE}encoder.mid.attn_1.", f"{VAE}decoder.mid.attn_1."):
        for old, new in names.items():
            renamed(f"{root}{old}.", f"{root}{new}.")(state)


LOADED: dict[str, tuple[str, Callable[[State], Any]]] = {
    "CLIP's older names": ("sd15", renamed(CLIP + "text_model.", CLIP)),
    "CLIP's older names in SDXL": ("sdxl", renamed(CLIP_XL + "text_model.", CLIP_XL)),
    "a projection under transformers' name": ("sdxl", unturned),
    "a projection that SDXL's first encoder does not use": ("sdxl", with_more(CLIP_XL + "text_projection.weight")),
    "what ComfyUI saves beside CLIP": (
        "sd15",
        with_more(CLIP + "text_projection.weight", CLIP + "logit_scale", "cond_stage_model.logit_scale"),
    ),
    "positions as whole numbers": ("sd15", with_more(CLIP + "text_model.embeddings.position_ids")),
    "CLIP's picture half": ("sd15", with_more(CLIP + "vision_model.encoder.layers.0.mlp.fc1.weight")),
    "no logit scale": ("sdxl", without(OPEN_XL + "logit_scale")),
    "SD2 without what it does not read": ("sd2", without(OPEN + "logit_scale", OPEN + "text_projection")),
    "SD2 with its last layer": ("sd2", with_more(OPEN + "transformer.resblocks.23.ln_1.weight")),
    "SD2 under SDXL's root": ("sd2", renamed(OPEN, "conditioner.embedders.0.model.")),
    "a VAE's discriminator": ("sd15", with_more(VAE + "loss.discriminator.main.0.weight", VAE + "loss.logvar")),
    "a VAE's average": ("sdxl", with_more(VAE + "model_ema.decay", VAE + "model_ema.encoderconv_inweight")),
    "a VAE's average as a copy": ("sd15", with_more(VAE + "ema.decoder.conv_in.weight")),
    "a VAE under its own root": ("sdxl", renamed(VAE, "vae.")),
    "a VAE with diffusers' attention": ("sd15", diffusers_attention),
    "the whole model's average": ("sd15", with_more("model_ema.decay", "model_ema.diffusion_modelout2weight")),
    "a schedule's buffers": ("sd15", with_more("betas", "alphas_cumprod", "logvar", "denoiser.sigmas")),
    "leftovers beside the U-Net's blocks": ("sd15", with_more(UNET + "num_batches_tracked")),
    "matrices as convolutions": ("sdxl", as_convolutions),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path, Path]]:
    """A kind's checkpoint, made once: to be copied before it is changed."""
    return cache(lambda kind: checkpoint(kind, tmp_path_factory.mktemp(kind)))


@pytest.mark.parametrize("case", narrowed(LOADED, *list(LOADED)[::4]))
def test_a_whole_file_loads_exactly(case: str, made: Any, tmp_path: Path) -> None:
    kind, change = LOADED[case]
    pipe, file, configs = made(kind)
    file = Path(shutil.copy2(file, tmp_path))
    loaded = load_single_file(changed(file, change), torch.float32, configs)
    for name in PARTS:
        if hasattr(pipe, name):
            ours, theirs = getattr(loaded, name).state_dict(), getattr(pipe, name).state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
            assert not any(value.is_meta for value in (*getattr(loaded, name).buffers(), *ours.values()))


REFUSED: dict[str, tuple[str, Callable[[State], Any], str]] = {
    "a block's weight": (
        "sd15",
        without(UNET + "output_blocks.1.0.in_layers.2.weight"),
        "U-Net lacks .*in_layers.2.weight",
    ),
    "a norm": ("sdxl", without(UNET + "out.0.bias"), "U-Net lacks .*out.0.bias"),
    "the label's embedding": ("sdxl", without(UNET + "label_emb.0.2."), "U-Net lacks .*label_emb.0.2.weight"),
    "the VAE's decoder": ("sd15", without(VAE + "decoder.up.1"), "VAE lacks .*decoder.up.1.* and 1"),
    "a part of the VAE's encoder": ("sd15", without(VAE + "encoder.conv_in"), "VAE lacks .*encoder.conv_in.weight"),
    "a quantising layer": ("sd15", without(VAE + "post_quant_conv.bias"), "VAE lacks .*post_quant_conv.bias"),
    "a renamed tensor": (
        "sd15",
        renamed(CLIP + "text_model.final_layer_norm", CLIP + "text_model.final_layernorm"),
        "text encoder lacks .*final_layer_norm.weight.*final_layer_norm.bias",
    ),
    "a fused projection": (
        "sdxl",
        without(OPEN_XL + "transformer.resblocks.1.attn.in_proj_weight"),
        "second text encoder lacks .*resblocks.1.attn.in_proj_weight",
    ),
    "the projection": ("sdxl", without(OPEN_XL + "text_projection"), "second text encoder lacks .*text_projection"),
    "the VAE": ("sdxl", without(VAE), "holds no VAE"),
    "another layer of CLIP": (
        "sd15",
        with_more(CLIP + "text_model.encoder.layers.2.layer_norm1.weight"),
        "another architecture.*text encoder also holds .*layers.2",
    ),
    "another block": (
        "sd15",
        with_more(UNET + "input_blocks.9.0.op.weight"),
        "U-Net also holds .*input_blocks.9",
    ),
    "a matrix turned": (
        "sd15",
        lambda s: s.update({UNET + "time_embed.0.weight": s[UNET + "time_embed.0.weight"].T.contiguous()}),
        r"time_embed.0.weight of its U-Net is \[16, 64\], where \[64, 16\] belongs",
    ),
    "a projection of odd rows": (
        "sdxl",
        lambda s: s.update({OPEN_XL + "transformer.resblocks.0.attn.in_proj_bias": torch.zeros(5)}),
        r"in_proj_bias .* is \[5\]",
    ),
    "four bits": ("sd15", with_more(UNET + "out.2.weight.absmax"), "absmax: its weights are quantised"),
    "whole numbers": (
        "sd15",
        lambda s: s.update({UNET + "out.2.weight": s[UNET + "out.2.weight"].to(torch.int8)}),
        "out.2.weight as torch.int8: its weights are quantised",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_incomplete_or_foreign_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    kind, change, why = REFUSED[case]
    _, file, configs = checkpoint(kind, tmp_path)
    with pytest.raises(OneStepError, match=why) as caught:
        load_single_file(changed(file, change), torch.float32, configs)
    assert "x.safetensors" in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("dtype", narrowed([torch.float16, torch.bfloat16, torch.float8_e4m3fn], torch.bfloat16))
def test_plain_weights_of_other_types_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    pipe, file, configs = checkpoint("sdxl", tmp_path)

    def cast(state: State) -> None:
        state.update({key: value.to(dtype) for key, value in state.items()})

    loaded = load_single_file(changed(file, cast), torch.float32, configs)
    for name in PARTS:
        theirs = getattr(pipe, name).state_dict()
        for key, value in getattr(loaded, name).state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, theirs[key].to(dtype).float())


def test_a_vae_without_encoder_draws(tmp_path: Path) -> None:
    """Only a picture that is given needs it, and then its absence is said."""
    pipe, file, configs = checkpoint("sd15", tmp_path)
    loaded = load_single_file(changed(file, without(VAE + "encoder.", VAE + "quant_conv.")), torch.float32, configs)
    loaded.register_modules(tokenizer=pipe.tokenizer)  # as small as the encoder
    call: dict[str, Any] = {"recipe": "sd-turbo-1", "seed": 0, "width": 16, "height": 16, "output_type": "pt"}
    ours, theirs = (OneStepPipeline.from_pipe(one)("a cat", **call).images for one in (loaded, pipe))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(OneStepError, match="VAE has no encoder"):
        adapt(loaded).latents_of(torch.rand(1, 3, 16, 16))
