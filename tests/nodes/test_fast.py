"""One-Step Fast in a running ComfyUI: the pictures of One-Step Sample and VAE Decode, and frames from one noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from lora_files import random_lora
from PIL import Image

from onestep.core.recipe import Recipe

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]
SEED, PROMPT = 11, "a red dragon"
RECIPE, GUIDED = Recipe((624.0,)), Recipe((624.0,), guidance=2.0)
Nodes = dict[str, dict[str, Any]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture(scope="module")
def loaded(comfy_server: Any, bundled: dict[str, Path]) -> Nodes:
    """The tiny model under a LoRA, its text, and two small pictures as a batch."""
    folder = comfy_server.base / "models" / "loras" / "onestep"
    folder.mkdir(parents=True, exist_ok=True)
    pipe = DiffusionPipeline.from_pretrained(bundled["tiny"])
    for name, recipe in (("fast", RECIPE), ("fast-guided", GUIDED)):
        random_lora(pipe, folder / f"{name}.safetensors", recipe, 0.05)
    for index in range(2):
        values = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(values).resize((32, 32)).save(comfy_server.base / "input" / f"frame-{index}.png")
    frames = {f"frame {index}": node("LoadImage", image=f"frame-{index}.png") for index in range(2)}
    return {
        "model": node("OneStepLoadTinyModel", name="tiny"),
        "lora": lora("fast"),
        "text": node("CLIPTextEncode", text=PROMPT, clip=["model", 1]),
        **frames,
        "frames": node("ImageBatch", image1=["frame 0", 0], image2=["frame 1", 0]),
    }


def lora(name: str) -> dict[str, Any]:
    name = f"onestep/{name}.safetensors"
    return node("OneStepLoadLoRA", model=["model", 0], lora_name=name, recipe="from the file")


def fast(**more: Any) -> dict[str, Any]:
    plugs = {"model": ["lora", 0], "clip": ["model", 1], "vae": ["model", 2], "recipe": ["lora", 1]}
    widgets = {"text": PROMPT, "width": 32, "height": 32, "batch_size": 2, "seed": SEED}
    return node("OneStepFast", **plugs, **widgets | more)


def by_parts(latent: str) -> Nodes:
    plugs = {"model": ["lora", 0], "positive": ["text", 0], "latent_image": [latent, 0], "recipe": ["lora", 1]}
    decoded = node("VAEDecode", samples=["sample", 0], vae=["model", 2])
    return {"sample": node("OneStepSample", seed=SEED, **plugs), "drawn": decoded}


def pictures(server: Any, nodes: Nodes) -> np.ndarray:
    finished = server.run({**nodes, "save": node("SaveImage", images=["drawn", 0], filename_prefix="fast")})
    assert finished.status == "success", finished.error
    return np.stack([np.asarray(picture) for picture in server.images(finished, "save")]).astype(int)


def test_a_text_is_drawn_as_by_its_parts(loaded: Nodes, comfy_server: Any) -> None:
    empty = {"empty": node("EmptyLatentImage", width=32, height=32, batch_size=2)}
    found = pictures(comfy_server, {**loaded, "drawn": fast()})
    wanted = pictures(comfy_server, {**loaded, **empty, **by_parts("empty")})
    assert found.shape[0] == 2 and found.std() > 5 and np.abs(found - wanted).max() <= 1


def test_frames_are_drawn_from_one_noise(loaded: Nodes, comfy_server: Any) -> None:
    """At strength 1 as by the parts; the second frame too begins with the seed's first noise, however many at once."""
    found = pictures(comfy_server, {**loaded, "drawn": fast(images=["frames", 0], strength=1.0)})
    for index in range(2):
        one = {"latent": node("VAEEncode", pixels=[f"frame {index}", 0], vae=["model", 2])}
        wanted = pictures(comfy_server, {**loaded, **one, **by_parts("latent")})
        assert np.abs(found[index] - wanted[0]).max() <= 1
    apart = pictures(comfy_server, {**loaded, "drawn": fast(images=["frames", 0], strength=1.0, batch_size=1)})
    assert np.abs(apart - found).max() <= 1 and np.abs(found[0] - found[1]).mean() > 1


def test_a_lower_strength_stays_nearer_to_the_frames(loaded: Nodes, comfy_server: Any) -> None:
    frames = np.stack([np.asarray(Image.open(comfy_server.base / "input" / f"frame-{i}.png")) for i in range(2)])
    apart = []
    for strength in (0.05, 0.5, 1.0):
        drawn = pictures(comfy_server, {**loaded, "drawn": fast(images=["frames", 0], strength=strength)})
        apart.append(np.abs(drawn - frames.astype(int)).mean())
    assert apart[0] < apart[1] < apart[2]


def test_a_recipe_with_guidance_is_refused_in_words(loaded: Nodes, comfy_server: Any) -> None:
    save = node("SaveImage", images=["drawn", 0], filename_prefix="fast")
    finished = comfy_server.run({**loaded, "lora": lora("fast-guided"), "drawn": fast(), "save": save})
    assert finished.status == "error" and "use One-Step Sample for it" in finished.error
