"""Anima from the trainer's node in a real ComfyUI: a student of four steps, its server killed on the way; what comes
out draws one picture by core's nodes, by ours and in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import from_the_node
import pytest
import tiny_folders
from from_the_node import TINY, Facts, Sister
from own_workflow import check_drawn, cut_short

from onestep.pipelines.load import load

pytestmark = [pytest.mark.comfy, pytest.mark.broad, pytest.mark.filterwarnings("ignore")]

SISTERS = {
    "wan": Sister(
        "diffusion_model.blocks.0.self_attn.q",
        48,
        "is a LoRA for the transformer of Wan, but this model is the transformer of Anima",
    ),
    "flux": Sister(
        "transformer.single_transformer_blocks.0.proj_mlp",
        48,
        "is a LoRA for the transformer of Flux, but this model is the transformer of Anima",
    ),
    "wider": Sister(
        "diffusion_model.blocks.0.self_attn.q_proj",
        5120,
        "has factors [2, 5120] and [5120, 2], this model needs [2, 48] and [48, 2]",
    ),
}
"""Of one attention in the names of another family, or of a wider model."""
ANIMA = Facts(
    **{"name": "anima", "layers": 38, "tokens": 24, "sisters": SISTERS, "seen": 0.1, "opened": load},
    **{"size": (32, 48), "latents": (16, 6, 4), "shape": (1, 16, 1, 6, 4), "unscaled": from_the_node.by_channel},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folders.anima_folder(tmp_path_factory.mktemp("anima") / "model")


@pytest.fixture(scope="module")
def uncut(folder: Path, comfy_server: Any) -> Path:
    return from_the_node.trained(ANIMA, folder, comfy_server)


def test_a_killed_server_goes_on_to_the_bit(uncut: Path, folder: Path, comfy: Any, pack: Path, tmp_path: Path) -> None:
    from_the_node.check_resumed(ANIMA, folder, uncut, comfy, pack, tmp_path)


def test_one_picture(uncut: Path, folder: Path, comfy_server: Any) -> None:
    from_the_node.check_one_picture(ANIMA, folder, uncut, comfy_server)


def test_what_belongs_to_another_model_is_refused(folder: Path, comfy_server: Any) -> None:
    """Its text encoder, and LoRAs, before anything is copied or written."""
    from_the_node.check_text_encoder_refused(ANIMA, folder, comfy_server)
    from_the_node.check_sisters_refused(ANIMA, folder, comfy_server)
    told = from_the_node.refused(ANIMA, folder)
    told["distil"]["inputs"]["model"] = ["tiny", 0]
    said = comfy_server.run({**told, "tiny": TINY}).error
    assert "gives tokens of 24 numbers, and this model reads 128: load" in said
    from_the_node.check_nothing_written(ANIMA, comfy_server)


def test_the_workflow_trains_and_draws(folder: Path, comfy_server: Any, root: Path) -> None:
    """Workflow 13 with the tiny folder in the place of a person's files, cut short."""
    check_drawn(comfy_server, cut_short(root, "13 distil Anima", folder))
