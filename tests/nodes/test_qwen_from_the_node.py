"""Qwen-Image from the trainer's node in a real ComfyUI: a student of four steps, its server killed on the way; what
comes out draws one picture by core's nodes, by ours and in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import from_the_node
import pytest
import tiny_qwen
from from_the_node import Facts, Sister
from own_workflow import check_drawn, cut_short
from tiny_pipelines import video_vae

pytestmark = [pytest.mark.comfy, pytest.mark.broad, pytest.mark.filterwarnings("ignore")]

SISTERS = {
    "lens": Sister("transformer.transformer_blocks.0.attn.img_qkv", 64, "This LoRA is for Lens"),
    "layered": Sister("transformer.time_text_embed.addition_t_embedding", 64, "This LoRA is for Qwen-Image-Layered"),
    "flux": Sister(
        "transformer.single_transformer_blocks.0.proj_mlp",
        64,
        "is a LoRA for the transformer of Flux, but this model is the transformer of Qwen-Image",
    ),
    "wider": Sister(
        "transformer.transformer_blocks.0.img_mod.1",
        3072,
        "has factors [2, 3072] and [3072, 2], this model needs [2, 64] and [384, 2]",
    ),
}
"""Of one layer in the names of another family, or of a wider model."""
QWEN = Facts(
    **{"name": "q", "layers": 34, "tokens": 256, "sisters": SISTERS, "unscaled": from_the_node.by_channel},
    **{"size": (64, 64), "latents": (16, 8, 8), "shape": (1, 16, 1, 8, 8), "empty": "EmptySD3LatentImage"},
)
"""Its prompts are of three lengths: their embeddings lie on the disk in their own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen.qwen_image_folder(tmp_path_factory.mktemp("qwen") / "model", video_vae(), 256, 2)


@pytest.fixture(scope="module")
def uncut(folder: Path, comfy_server: Any) -> Path:
    return from_the_node.trained(QWEN, folder, comfy_server)


def test_a_killed_server_goes_on_to_the_bit(uncut: Path, folder: Path, comfy: Any, pack: Path, tmp_path: Path) -> None:
    from_the_node.check_resumed(QWEN, folder, uncut, comfy, pack, tmp_path)


def test_one_picture(uncut: Path, folder: Path, comfy_server: Any) -> None:
    from_the_node.check_one_picture(QWEN, folder, uncut, comfy_server)


def test_what_belongs_to_another_model_is_refused(folder: Path, comfy_server: Any) -> None:
    """Its text encoder, LoRAs, and sizes that the hosts place differently, before anything is copied or written."""
    from_the_node.check_text_encoder_refused(QWEN, folder, comfy_server)
    from_the_node.check_sisters_refused(QWEN, folder, comfy_server)
    told = from_the_node.refused(QWEN, folder)
    told["distil"]["inputs"]["sizes"] = "48x64"
    assert "multiples of 32 pixels" in comfy_server.run(told).error
    from_the_node.check_nothing_written(QWEN, comfy_server)


def test_the_workflow_trains_and_draws(folder: Path, comfy_server: Any, root: Path) -> None:
    """Workflow 14 with the tiny folder in the place of a person's files, cut short."""
    check_drawn(comfy_server, cut_short(root, "14 distil Qwen-Image", folder))
