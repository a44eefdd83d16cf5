"""States of a base: loaded in inference mode and compiled ones are put right, others refused before anything is
written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler
from narrowed import narrowed
from tiny_pipelines import make
from torch import nn

import onestep
from onestep.core.errors import OneStepError
from onestep.pipelines.adapt import adapt
from onestep.pipelines.one_step import OneStepPipeline

FEW: dict[str, Any] = {
    **{"steps": 1, "warm_start": 1, "pairs": 2, "batch": 2, "teacher_steps": 2, "critic_warm_up": 0, "rank": 2},
    **{"critic_updates": 1, "preview_every": 0, "watch_every": 0, "watch_samples": 4, "sizes": "16x16"},
}


def network(pipe: Any) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


@pytest.mark.parametrize("name", narrowed(["sd", "sd3"], "sd"))
def test_a_pipeline_loaded_in_inference_mode_is_trained(name: str, tmp_path: Path) -> None:
    """The result is, to the bit, that of the same pipeline loaded without."""
    with torch.inference_mode():
        pipe = make(name)
    assert getattr(pipe, network(pipe)).state_dict().popitem()[1].is_inference()
    ours = onestep.distill(pipe, ["a cat", "red dog"], out=tmp_path / "ours", **FEW)
    theirs = onestep.distill(make(name), ["a cat", "red dog"], out=tmp_path / "theirs", **FEW)
    assert ours.path.read_bytes()[-10_000:] == theirs.path.read_bytes()[-10_000:]
    assert not any(value.is_inference() for value in pipe.vae.parameters())


def test_what_is_tied_stays_tied() -> None:
    with torch.inference_mode():
        pipe = make("flux")
    adapt(pipe).release()
    encoder = pipe.text_encoder_2
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight


@pytest.mark.broad
@pytest.mark.parametrize("name", narrowed(["sdxl", "sd3"], "sd3"))
@pytest.mark.parametrize("in_place", narrowed([False, True], True))
def test_a_compiled_network_is_trained_and_draws(name: str, in_place: bool, tmp_path: Path) -> None:
    pipe = make(name)
    part, preset = network(pipe), "sdxl-lightning-2" if name == "sdxl" else "sd3.5-turbo-4"

    def draw(**more: Any) -> Any:
        call: dict[str, Any] = {"recipe": preset, "seed": 1, "width": 16, "height": 16, "output_type": "np", **more}
        return OneStepPipeline.from_pipe(pipe)("a cat", **call).images

    plain, away = draw(), draw(negative_prompt="red", steering="nag")
    if in_place:
        getattr(pipe, part).compile(backend="eager")
    else:
        setattr(pipe, part, torch.compile(getattr(pipe, part), backend="eager"))
    np.testing.assert_allclose(draw(), plain, atol=1e-5)
    np.testing.assert_allclose(draw(negative_prompt="red", steering="nag"), away, atol=1e-5)
    result = onestep.distill(pipe, ["a cat"], out=tmp_path / "run", **FEW)
    assert result.path.is_file() and "loads all" in result.check
    np.testing.assert_allclose(draw(), plain, atol=1e-5)


def cached(pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))


def steps_skipped(pipe: Any) -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    config = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 5)
    pipe.transformer.enable_cache(config)


def stored_as(dtype: torch.dtype) -> Any:
    def change(pipe: Any) -> None:
        for layer in (getattr(pipe, "unet", None) or pipe.transformer).modules():
            if isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)

    return change


class OneWay(nn.Linear):
    """A layer whose kernel has no backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.detach(), self.weight.to(x.dtype), self.bias.to(x.dtype))


def one_way(pipe: Any) -> None:
    pipe.unet.time_embedding.linear_1 = OneWay(16, 64).to(torch.float8_e5m2)


REFUSED: dict[str, tuple[str, Any, str]] = {
    "on the meta device": ("sd", lambda p: p.unet.to("meta"), "is not in memory"),
    "one weight not loaded": (
        "sd3",
        lambda p: setattr(p.transformer.pos_embed.proj, "bias", nn.Parameter(torch.empty(16, device="meta"))),
        "pos_embed.proj.bias .*not in memory",
    ),
    "whole numbers": ("sd", stored_as(torch.int8), "int8, on which nothing can be trained"),
    "a layer without backward": ("sd", one_way, "OneWay of Parameter torch.float8_e5m2, on which nothing"),
    "stored in less": (
        "sd",
        lambda p: p.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        "float8_e4m3fn, on which nothing can be trained",
    ),
    "a cache": ("flux", cached, "answers from earlier steps .*disable_cache"),
    "attention of earlier steps": ("flux", steps_skipped, "answers from earlier steps .*disable_cache"),
    "a part wrapped by torch.compile": (
        "sd",
        lambda p: setattr(p.unet, "mid_block", torch.compile(p.unet.mid_block, backend="eager")),
        "torch.compile has wrapped a part",
    ),
    "EDM's levels": ("sdxl", lambda p: p.register_modules(scheduler=EDMEulerScheduler()), "has EDM's noise levels"),
    "EDM's levels behind v": (
        "sdxl",
        lambda p: p.register_modules(
            scheduler=EulerDiscreteScheduler(
                **{"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_max": 120.0}
            )
        ),
        "has EDM's noise levels",
    ),
    "no VAE": ("sd", lambda p: p.register_modules(vae=None), "has no vae"),
    "no text encoder": ("sdxl", lambda p: p.register_modules(text_encoder=None), "has no text_encoder"),
    "no tokenizer": ("flux", lambda p: p.register_modules(tokenizer=None), "has no tokenizer"),
}


F8 = [("sd", True), ("sd", False), ("sd3", True), ("sd3", False)]


@pytest.mark.parametrize(("name", "whole"), narrowed(F8, ("sd", True), ("sd3", False)))
def test_a_base_in_float8_is_trained_as_it_is(name: str, whole: bool, tmp_path: Path) -> None:
    """Its blocks stay in float8, half of bfloat16's room; the LoRA is like any other."""
    pipe = make(name)
    network = getattr(pipe, "unet", None) or pipe.transformer
    if whole:
        network.to(torch.float8_e4m3fn)
    else:
        stored_as(torch.float8_e4m3fn)(pipe)
    result = onestep.distill(pipe, ["a cat"], out=tmp_path / "run", **FEW)
    assert result.path.is_file() and "loads all" in result.check
    eights = [w for w in network.parameters() if w.dtype is torch.float8_e4m3fn]
    assert len(eights) > 10 and all(w.ndim in (2, 4) for w in eights)


@pytest.mark.parametrize("case", REFUSED)
def test_a_base_that_cannot_be_trained_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    name, change, why = REFUSED[case]
    pipe = make(name)
    change(pipe)
    with pytest.raises(OneStepError, match=why) as caught:
        onestep.distill(pipe, ["a cat"], out=tmp_path / "run", **FEW)
    assert not (tmp_path / "run").exists() and len(str(caught.value)) < 400
