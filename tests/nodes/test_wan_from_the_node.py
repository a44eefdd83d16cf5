"""Wan from the trainer's node in a real ComfyUI: a student of four steps, its server killed on the way; what comes
out draws one picture by core's nodes, by ours and in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import from_the_node
import pytest
import tiny_folders
from comfy_graphs import latents, saved, text
from comfy_support import GraphRefused
from from_the_node import Facts, Sister
from own_workflow import check_drawn, cut_short

from onestep.core.lora_file import load_lora
from onestep.core.recipe import Recipe
from onestep.pipelines.load import load

pytestmark = [pytest.mark.comfy, pytest.mark.broad, pytest.mark.filterwarnings("ignore")]

SISTERS = {
    "anima": Sister(
        "diffusion_model.blocks.0.self_attn.q_proj",
        24,
        "is a LoRA for the transformer of Anima, but this model is the transformer of Wan",
    ),
    "i2v": Sister("diffusion_model.blocks.0.cross_attn.k_img", 24, "This LoRA is for Wan image-to-video"),
    "wider": Sister(
        "diffusion_model.blocks.0.self_attn.q",
        5120,
        "has factors [2, 5120] and [5120, 2], this model needs [2, 24] and [24, 2]",
    ),
}
"""Of one attention in the names of another family, of a variant, or of a wider model."""
WAN = Facts(
    **{"name": "wan", "layers": 26, "tokens": 24, "sisters": SISTERS, "seen": 0.1, "opened": load},
    **{"size": (32, 48), "latents": (16, 6, 4), "shape": (1, 16, 1, 6, 4), "unscaled": from_the_node.by_channel},
)


HALVES = {"high": "0.875-1", "low": "0-0.875"}
"""The noise ranges of Wan 2.2's two experts."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folders.wan_folder(tmp_path_factory.mktemp("wan") / "model", 8.0)


@pytest.fixture(scope="module")
def uncut(folder: Path, comfy_server: Any) -> Path:
    return from_the_node.trained(WAN, folder, comfy_server)


def test_a_killed_server_goes_on_to_the_bit(uncut: Path, folder: Path, comfy: Any, pack: Path, tmp_path: Path) -> None:
    from_the_node.check_resumed(WAN, folder, uncut, comfy, pack, tmp_path)


def test_one_picture(uncut: Path, folder: Path, comfy_server: Any) -> None:
    from_the_node.check_one_picture(WAN, folder, uncut, comfy_server)


def test_what_belongs_to_another_model_is_refused(folder: Path, comfy_server: Any) -> None:
    """Its text encoder, LoRAs, and a run on frames, before anything is copied or written."""
    from_the_node.check_text_encoder_refused(WAN, folder, comfy_server)
    from_the_node.check_sisters_refused(WAN, folder, comfy_server)
    told = from_the_node.refused(WAN, folder)
    told["distil"]["inputs"]["sizes"] = "64x64x81"
    with pytest.raises(GraphRefused, match="but of 81 frames: a run is on pictures"):
        comfy_server.run(told)
    from_the_node.check_nothing_written(WAN, comfy_server)


def test_two_experts_are_trained_and_draw_one_behind_the_other(folder: Path, comfy_server: Any) -> None:
    """A run within each noise range; the second One-Step Sample goes on where the first has left its latents, and
    refuses to where another pair's boundary lies."""
    recipes = {}
    for half, levels in HALVES.items():
        told = from_the_node.graph(WAN, folder, half)
        told["distil"]["inputs"] |= {"noise_range": levels, "steps": 2, "student_steps": "2"}
        finished = comfy_server.run(told)
        assert finished.status == "success", finished.error
        file = load_lora(comfy_server.base / "models" / "loras" / "onestep" / f"{WAN.run(half)}.safetensors")
        recipes[half] = Recipe.from_json(str(file.recipe))
    high, low = recipes["high"], recipes["low"]
    assert high.steps == low.steps == 2 and high.end and not low.end
    assert high.end < high.timesteps[-1] and low.timesteps[0] == pytest.approx(high.end, rel=1e-3)
    drawn = latents(comfy_server, in_turn(folder, "high", "low"))
    assert drawn["second"].shape == WAN.shape and bool(drawn["second"].isfinite().all())
    assert float((drawn["second"] - drawn["first"]).abs().max()) > 0.1
    said = comfy_server.run(in_turn(folder, "high", "high") | {"save": saved("second")}).error
    assert "were left at time" in said and "this recipe begins at" in said, said


def in_turn(folder: Path, first: str, second: str) -> dict[str, Any]:
    """Two One-Step Samples, the second on what the first has left."""
    width, height = WAN.size
    empty = {"width": width, "height": height, "batch_size": 1}
    told = {"text": text(WAN.prompt, "model"), "empty": {"class_type": WAN.empty, "inputs": empty}}
    for name, half, before in (("first", first, "empty"), ("second", second, "first")):
        lora = {"model": ["model", 0], "lora_name": f"onestep/{WAN.run(half)}.safetensors", "recipe": "from the file"}
        told[f"{name} loaded"] = {"class_type": "OneStepLoadLoRA", "inputs": lora}
        plugs = {"model": [f"{name} loaded", 0], "recipe": [f"{name} loaded", 1], "positive": ["text", 0]}
        told[name] = {"class_type": "OneStepSample", "inputs": {**plugs, "latent_image": [before, 0], "seed": 5}}
    return WAN.model(folder, told)


def test_the_workflow_trains_and_draws(folder: Path, comfy_server: Any, root: Path) -> None:
    """Workflow 18 with the tiny folder in the place of a person's files, cut short."""
    check_drawn(comfy_server, cut_short(root, "18 distil Wan", folder))
