"""Chroma from the trainer's node in a real ComfyUI: a student of four steps, its server killed on the way; what comes
out draws one picture by core's nodes, by ours and in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import from_the_node
import pytest
import tiny_chroma
from from_the_node import Facts, Sister
from own_workflow import check_drawn, cut_short

pytestmark = [pytest.mark.comfy, pytest.mark.broad, pytest.mark.filterwarnings("ignore")]

SISTERS = {
    "flux": Sister(
        "transformer.single_transformer_blocks.0.norm.linear",
        32,
        "is a LoRA for the transformer of Flux, but this model is the transformer of Chroma",
    ),
    "radiance": Sister("diffusion_model.nerf_blocks.0.param_generator", 32, "This LoRA is for Chroma Radiance"),
    "maker": Sister(
        "diffusion_model.distilled_guidance_layer.in_proj",
        64,
        "which is not adapted here (it modulates every block by the time",
    ),
    "wider": Sister(
        "transformer.single_transformer_blocks.0.attn.to_q",
        3072,
        "has factors [2, 3072] and [3072, 2], this model needs [2, 32] and [32, 2]",
    ),
}
"""Of one layer in the names of another family, or of a wider model."""
CHROMA = Facts(
    **{"name": "chroma", "layers": 421, "tokens": 24, "updates": 8, "sisters": SISTERS},
    **{"size": (32, 32), "latents": (4, 8, 8), "shape": (1, 4, 8, 8)},
)
"""Its prompts are of three lengths: their embeddings lie on the disk in their own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chroma.chroma_folder(tmp_path_factory.mktemp("chroma") / "model")


@pytest.fixture(scope="module")
def uncut(folder: Path, comfy_server: Any) -> Path:
    return from_the_node.trained(CHROMA, folder, comfy_server)


def test_a_killed_server_goes_on_to_the_bit(uncut: Path, folder: Path, comfy: Any, pack: Path, tmp_path: Path) -> None:
    from_the_node.check_resumed(CHROMA, folder, uncut, comfy, pack, tmp_path)


def test_one_picture(uncut: Path, folder: Path, comfy_server: Any) -> None:
    from_the_node.check_one_picture(CHROMA, folder, uncut, comfy_server)


def test_what_belongs_to_another_model_is_refused(folder: Path, comfy_server: Any) -> None:
    """Its text encoder, and LoRAs, before anything is copied or written."""
    from_the_node.check_text_encoder_refused(CHROMA, folder, comfy_server)
    from_the_node.check_sisters_refused(CHROMA, folder, comfy_server)
    from_the_node.check_nothing_written(CHROMA, comfy_server)


def test_the_workflow_trains_and_draws(folder: Path, comfy_server: Any, root: Path) -> None:
    """Workflow 16 with the tiny folder in the place of a person's files, cut short."""
    check_drawn(comfy_server, cut_short(root, "16 distil Chroma", folder))
