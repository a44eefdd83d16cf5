"""Z-Image from the trainer's node in a real ComfyUI: a student of four steps, its server killed on the way; what comes
out draws one picture by core's nodes, by ours and in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import from_the_node
import pytest
import tiny_folders
from from_the_node import Facts, Sister
from own_workflow import check_drawn, cut_short

pytestmark = [pytest.mark.comfy, pytest.mark.broad, pytest.mark.filterwarnings("ignore")]

SISTERS = {
    "lumina": Sister(
        "diffusion_model.context_refiner.0.attn.to_q",
        288,
        "is a LoRA for the transformer of Lumina 2, but this model is the transformer of Z-Image",
    ),
    "qwen": Sister(
        "transformer.transformer_blocks.0.img_mlp.net.2",
        288,
        "is a LoRA for the transformer of Qwen-Image, but this model is the transformer of Z-Image",
    ),
    "flux": Sister(
        "transformer.single_transformer_blocks.0.proj_mlp",
        288,
        "is a LoRA for the transformer of Flux, but this model is the transformer of Z-Image",
    ),
    "wider": Sister(
        "transformer.layers.0.attention.to_q",
        3840,
        "has factors [2, 3840] and [3840, 2], this model needs [2, 288] and [288, 2]",
    ),
}
"""Of one attention in the names of another family, or of a wider model."""
Z_IMAGE = Facts("z", layers=37, tokens=24, size=(32, 32), latents=(4, 8, 8), shape=(1, 4, 8, 8), sisters=SISTERS)
"""Its prompts are of two lengths in which the network fills them up: their embeddings lie on the disk in their own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folders.z_image_folder(tmp_path_factory.mktemp("z_image") / "model")


@pytest.fixture(scope="module")
def uncut(folder: Path, comfy_server: Any) -> Path:
    return from_the_node.trained(Z_IMAGE, folder, comfy_server)


def test_a_killed_server_goes_on_to_the_bit(uncut: Path, folder: Path, comfy: Any, pack: Path, tmp_path: Path) -> None:
    from_the_node.check_resumed(Z_IMAGE, folder, uncut, comfy, pack, tmp_path)


def test_one_picture(uncut: Path, folder: Path, comfy_server: Any) -> None:
    from_the_node.check_one_picture(Z_IMAGE, folder, uncut, comfy_server)


def test_what_belongs_to_another_model_is_refused(folder: Path, comfy_server: Any) -> None:
    """Its text encoder, and LoRAs, before anything is copied or written."""
    from_the_node.check_text_encoder_refused(Z_IMAGE, folder, comfy_server)
    from_the_node.check_sisters_refused(Z_IMAGE, folder, comfy_server)
    from_the_node.check_nothing_written(Z_IMAGE, comfy_server)


def test_the_workflow_trains_and_draws(folder: Path, comfy_server: Any, root: Path) -> None:
    """Workflow 11 with the tiny folder in the place of a person's files, cut short."""
    check_drawn(comfy_server, cut_short(root, "11 distil Z-Image", folder))
