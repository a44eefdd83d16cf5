"""Graphs over HTTP that draw a few latents with any of the tiny models, and what they drew."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from small_runs import small

from onestep.training.methods import METHODS

SEED, PROMPT, NEGATIVE = 11, "a red dragon", "wall"
TINY = ("tiny", "tiny-flow")
BUNDLED = (*TINY, "tiny-dit")
ADAPTER_METHODS = [name for name, method in METHODS.items() if method.makes == "adapter"]
LORA, ADAPTER = 1, 0
"""Which output of the LoRA trainer, and of the adapter trainer, is the file."""
# Finer settings of a run of two updates: large steps, so that one update is seen.
QUICK = {"learning_rate": 0.05, "warm_up": 0, "ema": 0.0, "watch_samples": 4}


def loader(name: str) -> dict[str, Any]:
    if name in BUNDLED:
        return {"class_type": "OneStepLoadTinyModel", "inputs": {"name": name}}
    return {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"tiny_{name}.safetensors"}}


def text(words: str, clip: str = "texts") -> dict[str, Any]:
    return {"class_type": "CLIPTextEncode", "inputs": {"text": words, "clip": [clip, 1]}}


def saved(name: str) -> dict[str, Any]:
    return {"class_type": "SaveLatent", "inputs": {"samples": [name, 0], "filename_prefix": f"latents/{name}"}}


def ksampler(model: str, steps: int = 1, cfg: float = 1.0, **plugs: Any) -> dict[str, Any]:
    widgets = {"seed": SEED, "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple"}
    plugs = {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["empty", 0], **plugs}
    return {"class_type": "KSampler", "inputs": {**widgets, "denoise": 1.0, "model": [model, 0], **plugs}}


def distil(name: str, method: str, own: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A run of two updates on the graph's model, with the method's own settings: LORA or ADAPTER is where its output
    file is."""
    plugs = {"model": ["model", 0], "clip": ["model", 1], "vae": ["model", 2]}
    plan = {"preset": "Fast", "steps": 2, "student_steps": "1", "rank": 4, "sizes": "32x32"}
    more = {"teacher_steps": 2, "guidance": 3.0, "seed": 0, "name": name, "existing": "restart"}
    told = {**small(method, **(QUICK | (own or {}))), **plan, **more, **plugs, "prompts": f"{PROMPT}\na blue wall"}
    told |= changes
    if method not in ADAPTER_METHODS:
        return {"class_type": "OneStepDistil", "inputs": told}
    only = {name: value for name, value in told.items() if name not in ("preset", "student_steps", "rank")}
    return {"class_type": "OneStepTrainAdapter", "inputs": only}


def few_step(model: str, lora: str) -> dict[str, Any]:
    """A model under the LoRA that a run in the same graph has made."""
    told = {"model": [model, 0], "lora": [lora, 0], "strength_model": 1.0, "bypass": False}
    return {"class_type": "LoraModelLoader", "inputs": told}


def graph(name: str, side: int, **nodes: Any) -> dict[str, Any]:
    """Prompts and latents for a model, and these nodes; Flux reads SD3's texts."""
    told = {"width": side, "height": side, "batch_size": 2}
    return {
        "model": loader(name),
        "texts": loader("sd3" if name == "flux" else name),
        "positive": text(PROMPT),
        "negative": text(NEGATIVE),
        "empty": {"class_type": "EmptyLatentImage", "inputs": told},
        **nodes,
    }


def latents(server: Any, workflow: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What each sampler of the workflow draws."""
    samplers = ("KSampler", "SamplerCustomAdvanced", "OneStepSample")
    names = [name for name, node in workflow.items() if node["class_type"] in samplers]
    finished = server.run({**workflow, **{f"save {name}": saved(name) for name in names}})
    assert finished.status == "success", finished.error
    files = {name: finished.outputs[f"save {name}"]["latents"][0] for name in names}
    places = {name: server.base / "output" / file["subfolder"] / file["filename"] for name, file in files.items()}
    return {name: load_file(place)["latent_tensor"] for name, place in places.items()}


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max()) / float(b.std())
