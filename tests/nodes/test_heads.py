"""Methods with a discriminator head in a running ComfyUI."""

from __future__ import annotations

from typing import Any

import pytest
from narrowed import narrowed
from small_runs import small

from onestep.core.lora_file import load_lora
from onestep.core.tensor_file import read_tensors

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]

CASES = [(method, model) for method in ("dmd2", "f-distill", "ladd") for model in ("tiny", "tiny-flow")]


@pytest.mark.broad
@pytest.mark.parametrize(("method", "model"), narrowed(CASES, ("dmd2", "tiny")))
def test_the_node_trains_with_a_head(method: str, model: str, comfy_server: Any) -> None:
    """It appears in the node by itself; the result is a LoRA, the head is in the run's states alone."""
    name = f"{method}-{model}"
    finer = {"gan_start": 0.0, "gan_ramp": 0.0} if method != "ladd" else {"head_warm_up": 1}
    plugs = {"model": ["model", 0], "clip": ["model", 1], "vae": ["model", 2], "prompts": "a red dragon\na wall"}
    plan = {"preset": "Balanced", "steps": 3, "student_steps": "1", "rank": 2, "sizes": "32x32", "teacher_steps": 2}
    told = {**small(method, **finer), **plugs, **plan, "guidance": 2.0, "name": name, "existing": "continue"}
    graph = {
        "model": {"class_type": "OneStepLoadTinyModel", "inputs": {"name": model}},
        "distil": {"class_type": "OneStepDistil", "inputs": told},
    }
    finished = comfy_server.run(graph)
    assert finished.status == "success", finished.error
    lora = load_lora(comfy_server.base / "models" / "loras" / "onestep" / f"{name}.safetensors")
    assert any(bool(b.any()) for _, b in lora.state.values())
    run = comfy_server.base / "output" / "onestep" / name
    state = read_tensors(max(run.glob("state-*"), key=lambda path: int(path.name[6:])) / "state.safetensors")
    assert bool(state["head/leave.0.weight"].any())
    numbers = [data["numbers"] for data in finished.named("onestep.progress") if data["numbers"]]
    assert numbers and "ComfyUI" in finished.outputs["distil"]["text"][0]
