"""Methods with a discriminator head in a running ComfyUI."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import small

from onestep.core.lora_file import load_lora
from onestep.core.tensor_file import read_tensors
from onestep.pipelines.adapt import adapt
from onestep.pipelines.load import load
from onestep.training.data.real_pictures import opened

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]

CASES = [(method, model) for method in ("dmd2", "f-distill", "ladd") for model in ("tiny", "tiny-flow", "tiny-dit")]


def graph(method: str, model: str, name: str, **finer: Any) -> dict[str, Any]:
    plugs = {"model": ["model", 0], "clip": ["model", 1], "vae": ["model", 2], "prompts": "a red dragon\na wall"}
    plan = {"preset": "Balanced", "steps": 3, "student_steps": "1", "rank": 2, "sizes": "32x32", "teacher_steps": 2}
    told = {**small(method, **finer), **plugs, **plan, "guidance": 2.0, "name": name, "existing": "continue"}
    return {
        "model": {"class_type": "OneStepLoadTinyModel", "inputs": {"name": model}},
        "distil": {"class_type": "OneStepDistil", "inputs": told},
    }


@pytest.mark.broad
@pytest.mark.parametrize(("method", "model"), CASES)
def test_the_node_trains_with_a_head(method: str, model: str, comfy_server: Any) -> None:
    """It appears in the node by itself; the result is a LoRA, the head is in the run's states alone."""
    name = f"{method}-{model}"
    finer = {"gan_start": 0.0, "gan_ramp": 0.0} if method != "ladd" else {"head_warm_up": 1}
    finished = comfy_server.run(graph(method, model, name, **finer))
    assert finished.status == "success", finished.error
    lora = load_lora(comfy_server.base / "models" / "loras" / "onestep" / f"{name}.safetensors")
    assert any(bool(b.any()) for _, b in lora.state.values())
    run = comfy_server.base / "output" / "onestep" / name
    state = read_tensors(max(run.glob("state-*"), key=lambda path: int(path.name[6:])) / "state.safetensors")
    assert bool(state["head/leave.0.weight"].any())
    numbers = [data["numbers"] for data in finished.named("onestep.progress") if data["numbers"]]
    assert numbers and "ComfyUI" in finished.outputs["distil"]["text"][0]


@pytest.mark.broad
@pytest.mark.parametrize("model", ["tiny", "tiny-flow", "tiny-dit"])
def test_pictures_of_the_input_folder_are_real(model: str, comfy_server: Any) -> None:
    """Encoded by ComfyUI's VAE as diffusers' encodes them; the head needs no pairs."""
    mine = comfy_server.base / "input" / f"mine-{model}"
    mine.mkdir(parents=True)
    pixels = np.random.default_rng(2).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).resize((32, 32)).save(mine / "one.png")
    own = {"gan_start": 0.0, "gan_ramp": 0.0, "real_pictures": mine.name, "anchor": 0.0, "warm_start": 0}
    finished = comfy_server.run(graph("dmd2", model, f"mine-{model}", **own))
    assert finished.status == "success", finished.error
    run = comfy_server.base / "output" / "onestep" / f"mine-{model}"
    found = read_tensors(run / "pictures" / "32x32.safetensors")["x"]
    wanted = adapt(load(model), device="cpu").latents_of(opened(mine / "one.png", (32, 32))[None])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert not (run / "pairs").exists()


@pytest.mark.broad
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("empty", "real_pictures is 'input/empty', a folder with no pictures in it"),
        ("nowhere", "real_pictures is 'input/nowhere', which is no folder"),
        ("../output", "'..' is no name of a file or folder"),
    ],
)
def test_a_folder_that_holds_none_is_refused(name: str, why: str, comfy_server: Any) -> None:
    (comfy_server.base / "input" / "empty").mkdir(parents=True, exist_ok=True)
    finished = comfy_server.run(graph("dmd2", "tiny", "refused", real_pictures=name))
    assert finished.status == "error" and why in finished.error, finished.error
    assert str(comfy_server.base) not in finished.error
