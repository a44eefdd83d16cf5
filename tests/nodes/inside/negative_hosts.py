"""negative_hosts.py FOLDER WORK: a run of method sun on ComfyUI's objects, and what its adapter answers there."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from onestep.core.adapter_file import load_adapter
from onestep.core.negative_adapter import MAKERS
from onestep.nodes.adapt import adapted
from onestep.nodes.tiny_models.model import load_tiny
from onestep.training.distil import distil
from onestep.training.methods import settings_for

folder, work = Path(sys.argv[1]), Path(sys.argv[2])
told, given = json.loads((work / "told.json").read_text()), load_file(work / "in.safetensors")

with torch.inference_mode():
    model, clip, vae = load_tiny(folder)
    with adapted(model, clip, vae) as host:
        result = distil(host, told["prompts"], settings_for(**told["settings"]), work / "comfy")
        roles = host.denoiser.roles
        roles.add_module("student", load_adapter(result.path, MAKERS, "unet").module)
        cond, negative = host.encode(told["prompts"], (32, 32)), host.encode(told["negatives"], (32, 32))
        with torch.no_grad(), roles.installed(), roles.use("student", negative=negative, scale=1.5):
            x0 = host.denoiser(given["x"], given["sigma"].double(), cond)
        with torch.no_grad(), roles.installed(), roles.use("student"):
            plain = host.denoiser(given["x"], given["sigma"].double(), cond)
    save_file({"x0": x0.contiguous(), "plain": plain.contiguous()}, work / "out.safetensors")
