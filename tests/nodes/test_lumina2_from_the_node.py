"""Lumina 2 from the trainer's node in a real ComfyUI: a student of four steps, its server killed on the way; what comes
out draws one picture by core's nodes, by ours and in diffusers, whose own loader takes the second file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import from_the_node
import pytest
import tiny_folders
from comfy_graphs import latents
from diffusers import DiffusionPipeline
from from_the_node import Facts, Sister
from killed_server import factors
from own_workflow import check_drawn, cut_short
from student_drawing import drawing
from tiny_lumina2 import lumina2_folder

from onestep.core.lora_file import load_lora
from onestep.pipelines.adapt import adapt

pytestmark = [pytest.mark.comfy, pytest.mark.broad, pytest.mark.filterwarnings("ignore")]

SISTERS = {
    "z_image": Sister(
        "transformer.layers.0.attention.to_q",
        96,
        "is a LoRA for the transformer of Z-Image, but this model is the transformer of Lumina 2",
    ),
    "newbie": Sister("diffusion_model.clip_text_pooled_proj.1", 96, "This LoRA is for NewBie"),
    "wider": Sister(
        "transformer.layers.0.attn.to_q",
        2304,
        "has factors [2, 2304] and [2304, 2], this model needs [2, 96] and [96, 2]",
    ),
}
"""Of one attention in the names of another family, or of a wider model."""
LUMINA2 = Facts(
    **{"name": "lumina", "layers": 37, "tokens": 24, "sisters": SISTERS, "prompt": "Draw. <Prompt Start> a red dragon"},
    **{"others": ("a wall", "an old wall of blue stones")},
    **{"size": (32, 32), "latents": (4, 8, 8), "shape": (1, 4, 8, 8)},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vae = tiny_folders.shaken(tiny_folders.autoencoder(0.8, 0.1, plain=True), 2)
    return lumina2_folder(tmp_path_factory.mktemp("lumina2") / "model", vae)


@pytest.fixture(scope="module")
def uncut(folder: Path, comfy_server: Any) -> Path:
    return from_the_node.trained(LUMINA2, folder, comfy_server, "result_diffusers.safetensors is the same 37 layers")


@pytest.fixture(scope="module")
def second(uncut: Path) -> Path:
    return uncut.with_name("lumina-uncut_diffusers.safetensors")


def test_a_killed_server_goes_on_to_the_bit(uncut: Path, folder: Path, comfy: Any, pack: Path, tmp_path: Path) -> None:
    from_the_node.check_resumed(LUMINA2, folder, uncut, comfy, pack, tmp_path)


def test_the_second_file_lies_beside_it_and_is_diffusers_own(uncut: Path, second: Path, folder: Path) -> None:
    assert factors(second) == factors(uncut)
    host = adapt(DiffusionPipeline.from_pretrained(folder), device="cpu")
    assert "loads all 37 layers" in host.check_file(second)


def test_one_picture(uncut: Path, second: Path, folder: Path, comfy_server: Any) -> None:
    """Our nodes read the second file too, core's do not."""
    size, empty = LUMINA2.size, LUMINA2.empty
    told = drawing(folder, load_lora(uncut), second, LUMINA2.prompt, from_the_node.SEED, size, empty)
    told = {name: node for name, node in told.items() if name not in ("core", "base", "merged")}
    drawn = latents(comfy_server, told)["ours"]
    from_the_node.check_one_picture(LUMINA2, folder, uncut, comfy_server, second=drawn)


def test_what_belongs_to_another_model_is_refused(folder: Path, comfy_server: Any) -> None:
    """Its text encoder, and LoRAs, before anything is copied or written."""
    from_the_node.check_text_encoder_refused(LUMINA2, folder, comfy_server)
    from_the_node.check_sisters_refused(LUMINA2, folder, comfy_server)
    from_the_node.check_nothing_written(LUMINA2, comfy_server)


def test_the_workflow_trains_and_draws(folder: Path, comfy_server: Any, root: Path) -> None:
    """Workflow 17 with the tiny folder in the place of a person's files, cut short."""
    check_drawn(comfy_server, cut_short(root, "17 distil Lumina 2", folder))
