"""Guidance and control adapters in a running server: trained by the node, used in the same graph, on every layout."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_graphs import (
    ADAPTER,
    BUNDLED,
    LORA,
    PROMPT,
    SEED,
    TINY,
    apart,
    distil,
    few_step,
    graph,
    ksampler,
    latents,
    saved,
)
from diffusers import DiffusionPipeline
from narrowed import narrowed
from safetensors.torch import load_file

from onestep.core.adapter_file import read_told
from onestep.core.controls import control_of
from onestep.pipelines.control import controlled, load_control
from onestep.pipelines.guidance_adapter import load_guidance_adapter

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]
TOLERANCE = 1e-5
# A model, and the form of control that it learns.
CONTROL = {"control_width": 16, "noise_levels": 2}
CONTROLS = [("tiny", "light"), ("tiny-flow", "light"), ("tiny-dit", "light"), ("tiny", "copy")]
TRAINED = narrowed(CONTROLS, ("tiny", "light"))


def apply_guidance(adapter: Any, guidance: float = 4.0) -> dict[str, Any]:
    told = {"model": ["model", 0], "adapter": adapter, "guidance": guidance}
    return {"class_type": "OneStepApplyGuidanceAdapter", "inputs": told}


def by_control(adapter: Any, side: int, control: str = "canny", strength: float = 1.0) -> dict[str, Any]:
    """Nodes "light" to "controlled": a picture, its control, and Apply ControlNet with the adapter."""
    light, dark = (
        {"class_type": "EmptyImage", "inputs": {"width": wide, "height": wide, "batch_size": 1, "color": color}}
        for wide, color in ((side, 0xC08040), (side // 2, 0x102030))
    )
    mixed = {"destination": ["light", 0], "source": ["dark", 0], "x": side // 4, "y": side // 4, "resize_source": False}
    plugs = {"positive": ["positive", 0], "negative": ["negative", 0], "control_net": ["net", 0], "image": ["edges", 0]}
    told = {**plugs, "strength": strength, "start_percent": 0.0, "end_percent": 1.0}
    return {
        **{"light": light, "dark": dark},
        "mixed": {"class_type": "ImageCompositeMasked", "inputs": mixed},
        "edges": {"class_type": "OneStepControlPicture", "inputs": {"image": ["mixed", 0], "control": control}},
        "net": {"class_type": "OneStepLoadControl", "inputs": {"control_name": adapter}},
        "controlled": {"class_type": "ControlNetApplyAdvanced", "inputs": told},
    }


def under_control(model: str, steps: int = 1, cfg: float = 1.0) -> dict[str, Any]:
    return ksampler(model, steps, cfg, positive=["controlled", 0], negative=["controlled", 1])


# -- trained by the node ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", narrowed(BUNDLED, "tiny"))
def test_a_guidance_adapter_is_trained_and_used_in_one_graph(comfy_server: Any, name: str) -> None:
    nodes = {
        "distil": distil(f"guided-{name}", "agd"),
        "guide": apply_guidance(["distil", ADAPTER]),
        "guided": ksampler("guide", 2),
        "plain": ksampler("model", 2),
    }
    drawn = latents(comfy_server, graph(name, 32, **nodes))
    assert drawn["guided"].isfinite().all() and apart(drawn["guided"], drawn["plain"]) > 0.01
    file = comfy_server.base / "models" / "onestep" / f"guided-{name}.safetensors"
    told = read_told(file)
    kind = "guidance-cross-attention" if name == "tiny" else "guidance-offset"
    assert told is not None and told["kind"] == kind


def trained_control(server: Any, name: str, form: str) -> dict[str, Any]:
    """A run of nct on the one-step LoRA that the same graph has trained before, and what draws with both."""
    return {
        "first": distil(f"one-{name}", "regression"),
        "distil": distil(f"{form}-{name}", "nct", {**CONTROL, "control_form": form}, initial_lora=["first", LORA]),
        **by_control(["distil", ADAPTER], 32),
        "lora": few_step("model", "first"),
    }


@pytest.mark.parametrize(("name", "form"), TRAINED)
def test_a_control_is_trained_and_used_in_one_graph(comfy_server: Any, name: str, form: str) -> None:
    nodes = trained_control(comfy_server, name, form)
    plugs = {"positive": ["off", 0], "negative": ["off", 1]}
    nodes |= {"off": copy.deepcopy(nodes["controlled"]), "drawn off": ksampler("lora", **plugs)}
    nodes["off"]["inputs"]["strength"] = 0.0
    nodes |= {"drawn": under_control("lora"), "plain": ksampler("lora")}
    drawn = latents(comfy_server, graph(name, 32, **nodes))
    assert drawn["drawn"].isfinite().all() and apart(drawn["drawn"], drawn["plain"]) > 0.01
    assert torch.equal(drawn["drawn off"], drawn["plain"])
    file = comfy_server.base / "models" / "onestep" / f"{form}-{name}.safetensors"
    told, kind = read_told(file), {"light": "control", "copy": "control copy"}[form]
    assert told is not None and told["kind"] == kind and told["config"]["control"] == "canny"


@pytest.mark.broad
def test_a_copy_of_no_unet_is_refused_before_it_is_trained(comfy_server: Any) -> None:
    nodes = trained_control(comfy_server, "tiny-flow", "copy")
    refused = comfy_server.run(graph("tiny-flow", 32, **nodes, drawn=under_control("lora"), save=saved("drawn")))
    assert "control_form copy is a ControlNet for U-Nets" in refused.error and "set it to light" in refused.error
    assert not (comfy_server.base / "models" / "onestep" / "copy-tiny-flow.safetensors").exists()


@pytest.mark.broad
def test_the_run_says_which_node_loads_its_adapter_and_no_list_of_loras_shows_it(comfy_server: Any) -> None:
    nodes = {"distil": distil("in-subfolder/no-lora", "agd")}
    finished = comfy_server.run(graph("tiny", 32, **nodes))
    told = finished.outputs["distil"]["text"][0]
    assert told.startswith("in-subfolder/no-lora.safetensors") and "load it with Apply Guidance Adapter" in told
    assert not any("no-lora" in name for name in options(comfy_server, "LoraLoader", "lora_name"))
    assert "in-subfolder/no-lora.safetensors" in options(comfy_server, "OneStepApplyGuidanceAdapter", "adapter")
    assert "in-subfolder/no-lora.safetensors" in options(comfy_server, "OneStepLoadControl", "control_name")


def options(server: Any, node: str, name: str) -> list[str]:
    """What a list of files offers."""
    told = server.get(f"/object_info/{node}")[node]["input"]["required"][name]
    found = told[0] if isinstance(told[0], list) else told[1]["options"]
    return [option.replace("\\", "/") for option in found]


@pytest.mark.broad
def test_guidance_at_one_scale_is_a_lora_for_cores_loader(comfy_server: Any) -> None:
    nodes = {
        "distil": distil("guided-lora", "guidance-lora"),
        "lora": few_step("model", "distil"),
        "drawn": ksampler("lora", 2),
        "plain": ksampler("model", 2),
    }
    drawn = latents(comfy_server, graph("tiny", 32, **nodes))
    assert apart(drawn["drawn"], drawn["plain"]) > 0.01


# -- a control of one's own -------------------------------------------------------------------------------------------


def by_own_nodes(server: Any, **changes: Any) -> dict[str, Any]:
    """The generator's pictures, a mask of each by core's own nodes, and a run that is taught by them."""
    prompts = {"prompts": f"{PROMPT}\na blue wall", "initial_lora": ["first", LORA], "sizes": "32x32", "seed": 0}
    plugs = {"model": ["model", 0], "clip": ["model", 1], "vae": ["model", 2], "pairs": 4, "batch": 2}
    told = {"pictures": ["pictures", 0], "name": "redness", "masks": ["mask", 0]}
    return {
        "first": distil("own-first", "regression", existing="continue"),
        "pictures": {"class_type": "OneStepGeneratorPictures", "inputs": {**prompts, **plugs}},
        "mask": {"class_type": "ImageToMask", "inputs": {"image": ["pictures", 0], "channel": "red"}},
        "own": {"class_type": "OneStepOwnControl", "inputs": told},
        "distil": distil("redness", "nct", {**CONTROL, "control": ["own", 0]}, initial_lora=["first", LORA], **changes),
        "save": {"class_type": "SaveImage", "inputs": {"images": ["pictures", 0], "filename_prefix": "pictures"}},
    }


@pytest.mark.broad
def test_a_control_of_ones_own_is_taught_by_what_any_nodes_make(comfy_server: Any) -> None:
    """The run's triples hold what core's node made of the very pictures that the run draws."""
    finished = comfy_server.run(graph("tiny", 32, **by_own_nodes(comfy_server)))
    pictures = comfy_server.images(finished, "save")
    assert len(pictures) == 4 and abs(pictures[0].astype(int) - pictures[1]).max() > 20
    blocks = sorted((comfy_server.base / "output" / "onestep" / "redness" / "triples").glob("*.safetensors"))
    kept = torch.cat([load_file(block)["control"] for block in blocks])
    wanted = torch.stack([torch.from_numpy(picture[..., :1].copy()).permute(2, 0, 1) for picture in pictures])
    assert torch.equal(kept, wanted[: len(kept)])
    told = read_told(comfy_server.base / "models" / "onestep" / "redness.safetensors")
    assert told is not None and told["config"]["control"].startswith("redness-") and told["config"]["channels"] == 1


@pytest.mark.broad
def test_pictures_of_another_run_are_refused(comfy_server: Any) -> None:
    refused = comfy_server.run(graph("tiny", 32, **by_own_nodes(comfy_server, seed=1)))
    assert "'redness' has examples for 4 pictures, and the run draws another one" in refused.error
    neither = by_own_nodes(comfy_server)
    del neither["own"]["inputs"]["masks"]
    assert "takes controls or masks" in comfy_server.run(graph("tiny", 32, **neither)).error


# -- on every layout --------------------------------------------------------------------------------------------------


@pytest.mark.broad
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_adapters_act_on_every_layout(stirred: Any, name: str) -> None:
    """At CFG 1 and above; at guidance 1, and at strength 0, they are not there."""
    nodes = {
        "guide": apply_guidance(f"guidance-{name}.safetensors"),
        "off": apply_guidance(f"guidance-{name}.safetensors", 1.0),
        **by_control(f"control-{name}.safetensors", 64),
        "plain": ksampler("model", 2),
        "guided": ksampler("guide", 2),
        "guided off": ksampler("off", 2),
        "drawn": under_control("model", 2),
        "both": under_control("guide", 2),
        "with CFG": under_control("guide", 2, 3.0),
    }
    drawn = latents(stirred, graph(name, 64, **nodes))
    assert torch.equal(drawn["guided off"], drawn["plain"])
    others = ["guided", "drawn", "both", "with CFG"]
    assert all(drawn[other].isfinite().all() for other in others)
    seen = [apart(drawn[a], drawn[b]) for a in ["plain", *others] for b in others if a != b]
    assert min(seen) > 0.005, seen


@pytest.mark.parametrize("kind", ["guidance", "control"])
@pytest.mark.parametrize(("name", "other"), [("sd15", "sd3"), ("sd3", "flux"), ("flux", "sd15")])
def test_an_adapter_of_another_layout_is_refused(stirred: Any, kind: str, name: str, other: str) -> None:
    file = f"{kind}-{other}.safetensors"
    if kind == "guidance":
        nodes = {"guide": apply_guidance(file), "drawn": ksampler("guide")}
    else:
        nodes = {**by_control(file, 64), "drawn": under_control("model")}
    refused = stirred.run(graph(name, 64, **nodes, save=saved("drawn")))
    assert "base" in refused.error and "made for" in refused.error and len(refused.error) < 400, refused.error


# -- the same picture as diffusers' -----------------------------------------------------------------------------------


@torch.no_grad()
def drawn_by_diffusers(folder: Path, file: Path, edges: torch.Tensor | None) -> torch.Tensor:
    """One step with the adapter, in ComfyUI's scale of latents."""
    flow = folder.name == "tiny-flow"
    pipe = DiffusionPipeline.from_pretrained(folder, **({"text_encoder_3": None, "tokenizer_3": None} if flow else {}))
    pipe.set_progress_bar_config(disable=True)
    told = {} if folder.name == "tiny" else {"sigmas": [1.0]}
    if flow:
        told["max_sequence_length"] = 0
    unguided = 0.0 if folder.name == "tiny-dit" else 1.0  # diffusers' Z-Image counts from 0
    told |= {"num_inference_steps": 1, "guidance_scale": unguided, "width": 32, "height": 32, "output_type": "latent"}
    noise = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(SEED))
    if edges is None:
        load_guidance_adapter(pipe, file, guidance=4.0)
        drawn = pipe([PROMPT] * 2, latents=noise, **told).images
    else:
        with controlled(pipe, load_control(file, pipe), edges, strength=0.8):
            drawn = pipe([PROMPT] * 2, latents=noise, **told).images
    return drawn / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0)


@pytest.mark.parametrize("name", narrowed(TINY, "tiny"))
def test_both_hosts_draw_the_same_guidance(comfy_server: Any, bundled: dict[str, Path], name: str) -> None:
    """By the adapter that the first test has trained."""
    place = f"guided-{name}.safetensors"
    nodes = {"guide": apply_guidance(place), "guided": ksampler("guide")}
    drawn = latents(comfy_server, graph(name, 32, **nodes))["guided"]
    theirs = drawn_by_diffusers(bundled[name], comfy_server.base / "models" / "onestep" / place, None)
    assert apart(drawn, theirs) < TOLERANCE


@pytest.mark.parametrize(("name", "form"), TRAINED)
def test_both_hosts_draw_the_same_control(comfy_server: Any, bundled: dict[str, Path], name: str, form: str) -> None:
    """By the adapters that the tests above have trained, and the edges of a dark square on a light ground."""
    place = f"{form}-{name}.safetensors"
    nodes = {**by_control(place, 32, strength=0.8), "drawn": under_control("model")}
    drawn = latents(comfy_server, graph(name, 32, **nodes))["drawn"]
    picture = torch.tensor([0xC0, 0x80, 0x40]).div(255)[:, None, None].repeat(1, 32, 32)
    picture[:, 8:24, 8:24] = torch.tensor([0x10, 0x20, 0x30]).div(255)[:, None, None]
    edges = control_of("canny")(picture[None])
    assert 20 < float(edges.sum()) < 200
    theirs = drawn_by_diffusers(bundled[name], comfy_server.base / "models" / "onestep" / place, edges)
    # the hosts turn Z-Image's tokens by operations in another order
    assert apart(drawn, theirs) < (1e-4 if name == "tiny-dit" else TOLERANCE)
