"""The tiny models in ComfyUI's own classes give what diffusers gives, to 1e-5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore::FutureWarning")]
PROMPTS = ["a red dragon", "Zürich, (blue) wall!", ""]
TYPED = ["a red dragon", "Zürich, blue wall!", ""]  # ComfyUI reads brackets as emphasis


@pytest.fixture(scope="module", params=["tiny", "tiny-flow", "tiny-v"])
def both(request: Any, random_tiny: dict[str, Path], run_inside: Callable[..., str], tmp_path_factory: Any) -> Any:
    """(name, diffusers' pipeline, the inputs, what ComfyUI made of them)."""
    folder, place = random_tiny[request.param], tmp_path_factory.mktemp("both")
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(2, 4, 10, 6, generator=generator),
        "time": torch.tensor([7.0, 801.0]),
        "latents": torch.randn(2, 4, 10, 6, generator=generator),
        "pixels": torch.rand(1, 64, 48, 3, generator=generator),
        "flat": torch.tensor([[0.9, 0.2, 0.4], [0.1, 0.7, 0.6]])[:, None, None, :].expand(2, 32, 32, 3).contiguous(),
    }
    save_file(inputs, place / "in.safetensors")
    run_inside("tiny_forward", folder, place / "in.safetensors", place / "out.safetensors")
    absent = {"text_encoder_3": None, "tokenizer_3": None} if request.param == "tiny-flow" else {}
    pipe = DiffusionPipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return request.param, pipe, inputs, load_file(place / "out.safetensors")


def encode(pipe: Any, prompt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    if hasattr(pipe, "text_encoder_2"):
        text, _, pooled, _ = pipe.encode_prompt(
            prompt, prompt, prompt, do_classifier_free_guidance=False, max_sequence_length=0
        )
        return text, pooled
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0], None


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@torch.no_grad()
def test_prompts_become_the_same_tokens_and_embeddings(both: Any) -> None:
    _, pipe, _, comfy = both
    for index, prompt in enumerate(TYPED):
        ids = pipe.tokenizer(prompt, padding="max_length", max_length=24, truncation=True).input_ids
        text, pooled = encode(pipe, prompt)
        if index != 1:  # emphasis changes the values of the bracketed word
            assert comfy[f"ids{index}"].tolist() == ids
            assert distance(comfy[f"text{index}"], text) < 1e-5
            assert pooled is None or distance(comfy[f"pooled{index}"], pooled) < 1e-5
        else:
            assert comfy[f"ids{index}"].tolist() == ids
            assert comfy[f"text{index}"].shape == text.shape


@torch.no_grad()
def test_the_network_predicts_the_same(both: Any) -> None:
    name, pipe, inputs, comfy = both
    text, pooled = encode(pipe, PROMPTS[0])
    text = text.expand(2, -1, -1)
    if pooled is None:
        expected = pipe.unet(inputs["x"], inputs["time"], encoder_hidden_states=text).sample
    else:
        expected = pipe.transformer(inputs["x"], text, pooled.expand(2, -1), inputs["time"]).sample
    assert float(expected.std()) > 0.05, "a dead network proves nothing"
    assert distance(comfy["prediction"], expected) < 1e-5 * float(expected.std()) + 1e-5
    assert distance(comfy["copy"], expected) < 1e-5 * float(expected.std()) + 1e-5


@torch.no_grad()
def test_the_autoencoder_draws_the_same(both: Any) -> None:
    _, pipe, inputs, comfy = both
    decoded = (pipe.vae.decode(inputs["latents"]).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    encoded = pipe.vae.encode(inputs["pixels"].movedim(-1, 1) * 2 - 1).latent_dist.mode()
    config = pipe.vae.config
    assert comfy["encoded"].shape == (1, 4, 16, 12)
    assert distance(comfy["decoded"], decoded) < 1e-5
    assert distance(comfy["encoded"], encoded) < 1e-5
    assert distance(comfy["model_latents"], (encoded - (config.shift_factor or 0)) * config.scaling_factor) < 1e-5


def test_the_schedule_is_the_same(both: Any) -> None:
    name, pipe, _, comfy = both
    if name == "tiny-flow":
        u = torch.arange(1, 1001, dtype=torch.float64) / 1000
        expected = 3 * u / (1 + 2 * u)  # SD3, arXiv:2403.03206, Eq. 23, shift 3
    else:
        abar = pipe.scheduler.alphas_cumprod.double()
        expected = ((1 - abar) / abar).sqrt()
    assert torch.allclose(comfy["sigmas"].double(), expected, rtol=2e-5)


def test_preview_colours_lie_in_the_range_of_pictures(both: Any) -> None:
    """A random autoencoder has no faithful linear map; the fit must still answer with colours, not with noise."""
    assert float(both[3]["preview"].abs().max()) < 1.5
