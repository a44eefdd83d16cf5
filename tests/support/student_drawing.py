"""A graph that draws one student by core's nodes and by ours, from one noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_graphs import text

from onestep.cli.inspect import describe
from onestep.core.lora_file import LoraFile


def drawing(
    folder: Path, file: LoraFile, path: Path, prompt: str, seed: int, size: tuple[int, int], empty: str
) -> dict[str, Any]:
    """core's two nodes by the values that `onestep inspect` prints, with the LoRA and without, and ours. size: (width,
    height) in pixels; empty: the class of the node that makes the latents."""
    name, simple = f"onestep/{path.name}", describe(file, path)["comfyui"]["simple"]
    advanced = "start_at_step" in simple
    sampling = {**simple, ("noise_seed" if advanced else "seed"): seed, "latent_image": ["empty", 0]}
    sampling |= {"positive": ["text", 0], "negative": ["text", 0]}
    core = {"class_type": "KSamplerAdvanced" if advanced else "KSampler", "inputs": sampling}
    ours = {"positive": ["text", 0], "latent_image": ["empty", 0], "recipe": ["loaded", 1], "seed": seed}
    loaded = {"model": ["model", 0], "lora_name": name, "recipe": "from the file"}
    merged = {"model": ["model", 0], "lora_name": name, "strength_model": 1.0}
    return {
        "model": {"class_type": "LoadTinyFolder", "inputs": {"folder": str(folder)}},
        "text": text(prompt, "model"),
        "empty": {"class_type": empty, "inputs": {"width": size[0], "height": size[1], "batch_size": 1}},
        "merged": {"class_type": "LoraLoaderModelOnly", "inputs": merged},
        "loaded": {"class_type": "OneStepLoadLoRA", "inputs": loaded},
        "core": {**core, "inputs": {**sampling, "model": ["merged", 0]}},
        "base": {**core, "inputs": {**sampling, "model": ["model", 0]}},
        "ours": {"class_type": "OneStepSample", "inputs": {**ours, "model": ["loaded", 0]}},
    }
