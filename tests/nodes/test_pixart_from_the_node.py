"""PixArt-Sigma from the trainer's node in a real ComfyUI: a student of four steps, its server killed on the way; what
comes out draws one picture by core's nodes, by ours and in diffusers, as a guidance adapter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import from_the_node
import pytest
import tiny_pixart
import torch
from comfy_graphs import ADAPTER, distil, ksampler, latents, text
from diffusers import DiffusionPipeline
from from_the_node import SEED, Facts, Sister
from own_workflow import check_drawn, cut_short

from onestep.pipelines.guidance_adapter import load_guidance_adapter

pytestmark = [pytest.mark.comfy, pytest.mark.broad, pytest.mark.filterwarnings("ignore")]

SISTERS = {
    "wan": Sister(
        "diffusion_model.blocks.0.self_attn.q",
        48,
        "is a LoRA for the transformer of Wan, but this model is the transformer of PixArt-Sigma",
    ),
    "flux": Sister(
        "transformer.single_transformer_blocks.0.proj_mlp",
        48,
        "is a LoRA for the transformer of Flux, but this model is the transformer of PixArt-Sigma",
    ),
    "ltx": Sister("transformer.patchify_proj", 48, "This LoRA is for LTX"),
    "alpha": Sister("transformer.adaln_single.emb.aspect_ratio_embedder.linear_1", 48, "This LoRA is for PixArt-Alpha"),
    "wider": Sister(
        "transformer.transformer_blocks.0.attn1.to_q",
        1152,
        "has factors [2, 1152] and [1152, 2], this model needs [2, 48] and [48, 2]",
    ),
}
"""Of one layer in the names of another family, of a variant, or of a wider model."""
PIXART = Facts(
    **{"name": "pixart", "layers": 7 + 2 * 10, "tokens": 24, "sisters": SISTERS, "sizes": "40x40"},
    **{"size": (40, 48), "latents": (4, 48, 40), "shape": (1, 4, 48, 40)},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pixart.pixart_folder(tmp_path_factory.mktemp("pixart") / "model")


@pytest.fixture(scope="module")
def uncut(folder: Path, comfy_server: Any) -> Path:
    return from_the_node.trained(PIXART, folder, comfy_server)


def test_a_killed_server_goes_on_to_the_bit(uncut: Path, folder: Path, comfy: Any, pack: Path, tmp_path: Path) -> None:
    from_the_node.check_resumed(PIXART, folder, uncut, comfy, pack, tmp_path)


def test_one_picture(uncut: Path, folder: Path, comfy_server: Any) -> None:
    from_the_node.check_one_picture(PIXART, folder, uncut, comfy_server)


def test_what_belongs_to_another_model_is_refused(folder: Path, comfy_server: Any) -> None:
    """Its text encoder, LoRAs, and pictures too small for ComfyUI, before anything is copied or written."""
    from_the_node.check_text_encoder_refused(PIXART, folder, comfy_server)
    from_the_node.check_sisters_refused(PIXART, folder, comfy_server)
    told = from_the_node.refused(PIXART, folder)
    told["distil"]["inputs"]["sizes"] = "32x32"
    assert "draws from 33 pixels on" in comfy_server.run(told).error
    from_the_node.check_nothing_written(PIXART, comfy_server)


@torch.no_grad()
def guided_in_diffusers(folder: Path, file: Path) -> torch.Tensor:
    """By its own pipeline, whose one step ends at x0, in ComfyUI's scale of latents."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    load_guidance_adapter(pipe, file, guidance=4.0)
    noise = torch.randn(1, *PIXART.latents, generator=torch.manual_seed(SEED))
    told = {"num_inference_steps": 1, "guidance_scale": 1.0, "use_resolution_binning": False, "latents": noise}
    width, height = PIXART.size
    drawn = pipe(PIXART.prompt, **told, width=width, height=height, output_type="latent").images
    return from_the_node.scaled(pipe.vae.config, drawn)


def test_a_guidance_adapter_draws_one_picture(folder: Path, comfy_server: Any) -> None:
    """Trained by its node and applied in the same graph; in diffusers from its file. With CFG the negative's rows are
    nobody's."""
    name, (width, height) = PIXART.run("guided"), PIXART.size
    guide = {"model": ["model", 0], "adapter": ["distil", ADAPTER], "guidance": 4.0}
    nodes = {
        "distil": distil(name, "agd", sizes=PIXART.sizes),
        "guide": {"class_type": "OneStepApplyGuidanceAdapter", "inputs": guide},
        "positive": text(PIXART.prompt, "model"),
        "negative": text("", "model"),
        "empty": {"class_type": PIXART.empty, "inputs": {"width": width, "height": height, "batch_size": 1}},
        "guided": ksampler("guide"),
        "plain": ksampler("model"),
        "away": ksampler("model", positive=["negative", 0]),
        "with CFG": ksampler("guide", cfg=3.0),
    }
    drawn = latents(comfy_server, from_the_node.folder_model(folder, nodes))
    theirs = guided_in_diffusers(folder, comfy_server.base / "models" / "onestep" / f"{name}.safetensors")
    scale, away = float(drawn["guided"].std()), drawn["away"]
    assert float((drawn["guided"] - drawn["plain"]).abs().max()) > 0.01 * scale, "the adapter's effect must be seen"
    assert float((drawn["guided"] - theirs).abs().max()) < 1e-4 * scale
    wanted = away + 3 * (drawn["guided"] - away)
    assert float((drawn["with CFG"] - wanted).abs().max()) < 1e-4 * scale


def test_the_workflow_trains_and_draws(folder: Path, comfy_server: Any, root: Path) -> None:
    """Workflow 21 with the tiny folder in the place of a person's files, cut short."""
    told = cut_short(root, "21 distil PixArt-Sigma", folder)
    (trainer,) = (node["inputs"] for node in told.values() if node["class_type"] == "OneStepDistil")
    trainer["sizes"] = PIXART.sizes
    check_drawn(comfy_server, told)
