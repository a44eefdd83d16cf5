"""Krea 2 from the trainer's node in a real ComfyUI, its MODEL by ComfyUI's own loader: a student of four steps, its
server killed on the way; what comes out draws one picture by core's nodes, by ours and in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import from_the_node
import pytest
import tiny_krea2
import torch
from diffusers import AutoencoderKLQwenImage
from from_the_node import Facts, Sister, folder_model
from own_workflow import check_drawn, cut_short
from tiny_pipelines import randomise

pytestmark = [pytest.mark.comfy, pytest.mark.broad, pytest.mark.filterwarnings("ignore")]

FILE = "krea2_raw_tiny.safetensors"


def with_model(folder: Path, nodes: dict[str, Any]) -> dict[str, Any]:
    """``nodes``, whose "model" is ComfyUI's own loader's MODEL and the folder's CLIP and VAE."""
    nodes = folder_model(folder, nodes)
    for node in nodes.values():
        plugs = node["inputs"].items()
        node["inputs"] = {name: ["unet", 0] if plug == ["model", 0] else plug for name, plug in plugs}
    return {**nodes, "unet": {"class_type": "UNETLoader", "inputs": {"unet_name": FILE, "weight_dtype": "default"}}}


SISTERS = {
    "lens": Sister("transformer.transformer_blocks.0.attn.img_qkv", 256, "This LoRA is for Lens"),
    "qwen": Sister(
        "transformer.transformer_blocks.0.img_mlp.net.2",
        256,
        "is a LoRA for the transformer of Qwen-Image, but this model is the transformer of Krea 2",
    ),
    "wan": Sister("diffusion_model.blocks.0.self_attn.q", 256, "Wan"),
    "wider": Sister(
        "transformer.transformer_blocks.0.attn.to_gate",
        6144,
        "has factors [2, 6144] and [6144, 2], this model needs [2, 256] and [256, 2]",
    ),
}
"""Of one layer in the names of another family, or of a wider model."""
KREA2 = Facts(
    **{"name": "k", "layers": 8 + 8 * (1 + 4), "tokens": 120, "sisters": SISTERS, "model": with_model},
    **{"size": (64, 64), "latents": (16, 8, 8), "shape": (1, 16, 1, 8, 8), "empty": "EmptySD3LatentImage"},
    unscaled=from_the_node.by_channel,
)
"""Its prompts are of three lengths: their embeddings lie on the disk in their own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its autoencoder has the published statistics, which ComfyUI's MODEL knows."""
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(base_dim=4).eval()
    randomise(vae)
    told = {"sizes": tiny_krea2.OWN, "distilled": True}
    return tiny_krea2.krea2_folder(tmp_path_factory.mktemp("krea2") / "model", vae, **told)


@pytest.fixture(scope="module")
def server(folder: Path, comfy_server: Any) -> Any:
    tiny_krea2.own_checkpoint(folder, comfy_server.base / "models" / "diffusion_models" / FILE)
    return comfy_server


@pytest.fixture(scope="module")
def uncut(folder: Path, server: Any) -> Path:
    return from_the_node.trained(KREA2, folder, server)


def test_a_killed_server_goes_on_to_the_bit(uncut: Path, folder: Path, comfy: Any, pack: Path, tmp_path: Path) -> None:
    tiny_krea2.own_checkpoint(folder, tmp_path / "models" / "diffusion_models" / FILE)
    from_the_node.check_resumed(KREA2, folder, uncut, comfy, pack, tmp_path)


def test_one_picture(uncut: Path, folder: Path, server: Any) -> None:
    from_the_node.check_one_picture(KREA2, folder, uncut, server)


def test_what_belongs_to_another_model_is_refused(folder: Path, server: Any) -> None:
    """Its text encoder, LoRAs, and sizes of half a token, before anything is copied or written."""
    from_the_node.check_text_encoder_refused(KREA2, folder, server)
    from_the_node.check_sisters_refused(KREA2, folder, server)
    told = from_the_node.refused(KREA2, folder)
    told["distil"]["inputs"]["sizes"] = "40x64"
    assert "multiples of 16 pixels" in server.run(told).error
    from_the_node.check_nothing_written(KREA2, server)


def test_the_workflow_trains_and_draws(folder: Path, server: Any, root: Path) -> None:
    """Workflow 15 with ComfyUI's own loader's MODEL and the tiny folder in the place of a person's files, cut short."""
    check_drawn(server, with_model(folder, cut_short(root, "15 distil Krea 2", folder)))
