"""What a person is told in a running server of adapters and numbers that do not fit: the value found, what to do."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_graphs import graph, ksampler, saved
from comfy_support import GraphRefused
from small_networks import network_of

from onestep.core.adapter_file import save_adapter
from onestep.core.control import new_adapter as new_control
from onestep.core.families import bind_diffusers
from onestep.core.guidance_adapter import new_adapter

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]
NAN = float("nan")
STEER = {"mode": "NAG", "scale": 0.0, "tau": 2.5, "alpha": 0.25, "start_percent": 0.0, "end_percent": 1.0}


@pytest.fixture(scope="module")
def server(comfy_server: Any) -> Any:
    """With adapters of other bases than `tiny` in its folders, and a file that is none."""
    models = comfy_server.base / "models"
    (models / "controlnet").mkdir(exist_ok=True)
    for name in ("sd15", "sd3"):
        family = {"sd15": "unet"}.get(name, name)
        targets = {target.name: target for target in bind_diffusers(network_of(name))}
        shape = (4 if name == "sd15" else 16, 8, 8)
        save_adapter(models / "onestep" / f"guidance-{name}.safetensors", new_adapter(targets, family, 1), family)
        save_adapter(models / "loras" / "no-lora.safetensors", new_adapter(targets, family, 1), family)
        control = new_control(family, targets, ("canny", 1), (64, 64), shape, width=8)
        save_adapter(models / "controlnet" / f"control-{name}.safetensors", control, family)
        save_adapter(models / "onestep" / f"control-{name}.safetensors", control, family)
    (models / "onestep" / "broken.safetensors").write_bytes(b"\x00" * 64)
    return comfy_server


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def guided(adapter: str, guidance: float = 4.0) -> dict[str, Any]:
    name = f"{adapter}.safetensors"
    return {"used": node("OneStepApplyGuidanceAdapter", model=["model", 0], adapter=name, guidance=guidance)}


def controlled(adapter: str) -> dict[str, Any]:
    """Core's Apply ControlNet; `used` is the plain model again, drawn under it."""
    apply = {"positive": ["positive", 0], "negative": ["negative", 0], "control_net": ["net", 0], "image": ["image", 0]}
    return {
        "net": node("OneStepLoadControl", control_name=f"{adapter}.safetensors"),
        "image": node("EmptyImage", width=48, height=40, batch_size=1, color=0),
        "apply": node("ControlNetApplyAdvanced", **apply, strength=1.0, start_percent=0.0, end_percent=1.0),
        "used": node("OneStepLoadTinyModel", name="tiny"),
    }


def steered(**changes: Any) -> dict[str, Any]:
    told = {"model": ["model", 0], "negative": ["negative", 0], **STEER, **changes}
    return {"used": node("OneStepNegativeSteering", **told)}


def lora(name: str) -> dict[str, Any]:
    told = {"model": ["model", 0], "lora_name": f"{name}.safetensors", "recipe": "from the file"}
    return {"used": node("OneStepLoadLoRA", **told)}


BAD = {
    "adapter of another U-Net": (guided("guidance-sd15"), ("another base", "it needs", "here it finds", "Choose")),
    "adapter of another family": (guided("guidance-sd3"), ("made for 'sd3' models", "this one is 'unet'", "choose")),
    "control as a guidance adapter": (guided("control-sd15"), ("'control'", "'guidance-cross-attention'", "choose")),
    "no adapter": (guided("broken"), ("broken.safetensors",)),
    "guidance NaN": (guided("guidance-sd15", NAN), ("guidance is nan", "1 (none) to 30")),
    "adapter as a LoRA": (lora("no-lora"), ("holds an adapter, no LoRA", "Apply Guidance Adapter")),
    "scale NaN": (steered(scale=NAN), ("scale is nan", "NAG at 2 to 8")),
    "scale below none": (steered(scale=0.5), ("scale is 0.5", "1 to 100")),
    "control of another U-Net": (
        controlled("control-sd15"),
        ("channels", "this model", "choose an adapter of its base"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_it_is_told_with_what_was_found_and_what_to_do(case: str, server: Any) -> None:
    nodes, words = BAD[case]
    plugs = {"positive": ["apply", 0], "negative": ["apply", 1]} if "apply" in nodes else {}
    drawn = {"drawn": ksampler("used", **plugs), "save": saved("drawn")}
    told = server.run(graph("tiny", 32, **nodes, **drawn)).error
    assert told and len(told) < 400 and all(word in told for word in words), told


@pytest.mark.parametrize("nodes", [guided("guidance-sd15", 31.0), guided("guidance-sd15", 0.5), steered(scale=101.0)])
def test_widgets_hold_their_ranges(nodes: dict[str, Any], server: Any) -> None:
    drawn = {"drawn": ksampler("used"), "save": saved("drawn")}
    with pytest.raises(GraphRefused, match="bigger than max|smaller than min"):
        server.run(graph("tiny", 32, **nodes, **drawn))
