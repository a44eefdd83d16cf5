"""Negative Steering in a running server: every layout, both samplers, the same picture as diffusers', refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_graphs import NEGATIVE, PROMPT, SEED, TINY, distil, graph, ksampler, latents, loader, saved, text
from diffusers import DiffusionPipeline
from narrowed import narrowed
from rounding import between_hosts

from onestep.core.schedule import FlowSchedule, VPSchedule
from onestep.pipelines.steer import steered

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]
SCHEDULES = {"tiny": VPSchedule.scaled_linear(), "tiny-flow": FlowSchedule(3.0)}
FIELDS = {"scale": 0.0, "tau": 0.0, "alpha": 0.0, "start_percent": 0.0, "end_percent": 1.0}
PRESETS = {"tiny": "sd-turbo-1", "tiny-flow": "sd3.5-turbo-4"}
MODES = ("NASA", "NAG", "VSF", "PERP")


def negative_text(words: str) -> dict[str, Any]:
    """CLIP Text Encode (Negative), which every mode takes."""
    return {"class_type": "OneStepEncodeNegative", "inputs": {"clip": ["texts", 1], "text": words}}


def steering(mode: str, **changes: Any) -> dict[str, Any]:
    plugs = {"model": ["model", 0], "negative": ["negative" if mode == "NASA" else "own", 0]}
    return {"class_type": "OneStepNegativeSteering", "inputs": {**plugs, "mode": mode, **FIELDS, **changes}}


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", *TINY])
def test_every_layout_is_steered_over_http(server_with_checkpoints: Any, name: str) -> None:
    nodes: dict[str, Any] = {"plain": ksampler("model", 2), "nothing": text(""), "own": negative_text(NEGATIVE)}
    for mode in MODES:
        nodes |= {f"steer {mode}": steering(mode, empty=["nothing", 0]), mode: ksampler(f"steer {mode}", 2)}
    drawn = latents(server_with_checkpoints, graph(name, 32 if name in TINY else 64, **nodes))
    for mode in MODES:
        assert bool(drawn[mode].isfinite().all())
        assert float((drawn[mode] - drawn["plain"]).abs().max()) > 0.01 * float(drawn["plain"].std()), mode


@torch.no_grad()
def drawn_by_diffusers(folder: Path, mode: str) -> torch.Tensor:
    """One step, in ComfyUI's scale of latents."""
    flow = folder.name == "tiny-flow"
    pipe = DiffusionPipeline.from_pretrained(folder, **({"text_encoder_3": None, "tokenizer_3": None} if flow else {}))
    pipe.set_progress_bar_config(disable=True)
    no_t5 = {"max_sequence_length": 0} if flow else {}
    noise = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(SEED))
    with steered(pipe, NEGATIVE, mode):
        drawn = pipe(
            [PROMPT] * 2,
            num_inference_steps=1,
            guidance_scale=1.0,
            latents=noise,
            width=32,
            height=32,
            output_type="latent",
            **({**no_t5, "sigmas": [1.0]} if flow else {}),
        ).images
    return drawn / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0)


@pytest.mark.parametrize("mode", narrowed(MODES, *MODES[1:3]))
@pytest.mark.parametrize("name", TINY)
def test_both_hosts_draw_the_same(comfy_server: Any, bundled: dict[str, Path], name: str, mode: str) -> None:
    nodes = {"nothing": text(""), "own": negative_text(NEGATIVE)}
    nodes |= {"steer": steering(mode, empty=["nothing", 0]), "steered": ksampler("steer")}
    ours = latents(comfy_server, graph(name, 32, **nodes))["steered"]
    theirs = drawn_by_diffusers(bundled[name], mode.lower())
    assert float((ours - theirs).abs().max()) < between_hosts(SCHEDULES[name]) * float(theirs.abs().max())


@pytest.mark.parametrize("name", TINY)
def test_one_step_sample_draws_a_steered_model(comfy_server: Any, name: str) -> None:
    """Its recipe on a steered MODEL, loaded before or after; one step of it is KSampler's."""
    nodes: dict[str, Any] = {"steer": steering("NAG"), "after": steering("NAG", model=["loaded", 0])}
    nodes["own"] = negative_text(NEGATIVE)
    for place, model in (("loaded", "model"), ("before", "steer")):
        told = {"lora_name": "none (the model is few-step itself)", "recipe": PRESETS[name], "model": [model, 0]}
        nodes[place] = {"class_type": "OneStepLoadLoRA", "inputs": told}
    plugs = {"positive": ["positive", 0], "latent_image": ["empty", 0], "seed": SEED, "recipe": ["loaded", 1]}
    for place in ("before", "after", "loaded"):
        told = {**plugs, "model": [place, 0]}
        nodes[f"drawn {place}"] = {"class_type": "OneStepSample", "inputs": told}
    drawn = latents(comfy_server, graph(name, 32, **nodes, core=ksampler("steer")))
    scale = float(drawn["core"].std())
    assert torch.equal(drawn["drawn before"], drawn["drawn after"])
    assert float((drawn["drawn before"] - drawn["drawn loaded"]).abs().max()) > 0.01 * scale
    if name == "tiny":
        assert float((drawn["drawn before"] - drawn["core"]).abs().max()) < between_hosts(SCHEDULES[name]) * scale


def test_distillation_refuses_a_steered_teacher_by_name(comfy_server: Any) -> None:
    plugs = {"model": ["steer", 0], "clip": ["texts", 1], "vae": ["texts", 2]}
    nodes = {"steer": steering("NASA"), "distil": distil("steered-teacher", "regression", **plugs)}
    refused = comfy_server.run(graph("tiny", 32, **nodes))
    assert "negative_steering" in refused.error and len(refused.error) < 400, refused.error
    assert not (comfy_server.base / "output" / "onestep" / "steered-teacher").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"negative": ["foreign", 0]}, ("4096", "CLIP")),
        ({"start_percent": 0.5, "end_percent": 0.5}, ("start_percent",)),
        ({"mode": "NAG", "scale": 0.5, "negative": ["negative", 0]}, ("scale", "0.5")),
        ({"mode": "VSF", "negative": ["negative", 0]}, ("VSF", "padding", "CLIP Text Encode (Negative)")),
        ({"model": ["other", 0], "negative": ["foreign", 0], "layers": "decoder"}, ("layers", "U-Nets", "sd3")),
    ],
)
def test_bad_input_is_told_to_the_person(server_with_checkpoints: Any, changes: Any, words: tuple[str, ...]) -> None:
    nodes = {"other": loader("sd3"), "foreign": text("red", "other"), "steer": steering(**{"mode": "NASA", **changes})}
    refused = server_with_checkpoints.run(graph("tiny", 32, **nodes, drawn=ksampler("steer"), save=saved("drawn")))
    assert all(word in refused.error for word in words) and len(refused.error) < 400, refused.error
