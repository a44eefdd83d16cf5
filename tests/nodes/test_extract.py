"""Extract Few-Step LoRA in a running ComfyUI: what a LoRA had added to a model comes out of it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from lora_files import random_lora

from onestep.core.lora_file import load_lora
from onestep.core.recipe import PRESETS, Recipe

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]
RECIPES = {"tiny": "dmd2-1", "tiny-flow": "sd3.5-turbo-4"}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture(scope="module", params=RECIPES)
def case(request: Any, comfy_server: Any, bundled: dict[str, Path]) -> Any:
    """(model's name, the file of a LoRA for it, the graph's first nodes: the base, and the base under that LoRA)."""
    name = request.param
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "tiny-flow" else {}
    folder = comfy_server.base / "models" / "loras" / "onestep"
    folder.mkdir(parents=True, exist_ok=True)
    pipe = DiffusionPipeline.from_pretrained(bundled[name], **absent)
    file = random_lora(pipe, folder / f"hidden-{name}.safetensors", None, 0.05)
    few = node("LoraLoaderModelOnly", model=["base", 0], lora_name=f"onestep/{file.name}", strength_model=0.5)
    return name, file, {"base": node("OneStepLoadTinyModel", name=name), "few": few}


def extracted(server: Any, nodes: dict[str, Any], name: str, **more: Any) -> Any:
    told = {
        "base": ["base", 0],
        "few_step": ["few", 0],
        "rank": 4,
        "name": f"out-{name}",
        "recipe": RECIPES[name],
    } | more
    return server.run({**nodes, "out": node("OneStepExtract", **told)})


def test_a_hidden_lora_comes_out_again(case: Any, comfy_server: Any) -> None:
    name, file, nodes = case
    finished = extracted(comfy_server, nodes, name)
    assert finished.status == "success", finished.error
    said = finished.outputs["out"]["text"][0]
    assert f"onestep/out-{name}.safetensors" in said and "keeps 100.0%" in said and "loads all" in said
    hidden, found = load_lora(file).state, load_lora(file.with_name(f"out-{name}.safetensors"))
    assert found.state.keys() == hidden.keys() and Recipe.from_json(found.recipe) == PRESETS[RECIPES[name]]
    for layer, (a, b) in hidden.items():
        wanted, mine = (
            0.5 * b.flatten(1) @ a.flatten(1),
            found.state[layer][1].flatten(1) @ found.state[layer][0].flatten(1),
        )
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-5)


def test_two_that_are_no_pair_are_refused(case: Any, comfy_server: Any) -> None:
    name, _, nodes = case
    other = "tiny-flow" if name == "tiny" else "tiny"
    wrong = {**nodes, "few": node("OneStepLoadTinyModel", name=other)}
    assert "two checkpoints of one base" in extracted(comfy_server, wrong, name).error
    assert "nothing to extract" in extracted(comfy_server, nodes, name, few_step=["base", 0]).error
    strange = extracted(comfy_server, nodes, name, recipe=RECIPES[other])
    assert strange.status == "error" and "this is" in strange.error
