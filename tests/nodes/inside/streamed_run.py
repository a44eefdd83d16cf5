"""streamed_run.py FOLDER WORK: a whole run in ComfyUI with its base streamed, beside the same with it resident."""

import json
import sys
from pathlib import Path

import torch

from onestep.core.tensor_file import read_tensors
from onestep.nodes.adapt import adapted
from onestep.nodes.tiny_models.model import load_tiny
from onestep.training.distil import distil
from onestep.training.presets import preset

FOLDER, WORK = Path(sys.argv[1]), Path(sys.argv[2])
SMALL = {"warm_start": 1, "critic_warm_up": 1, "critic_updates": 1, "batch": 2, "pairs": 2, "teacher_steps": 2}
SMALL |= {"watch_every": 2, "watch_samples": 4, "preview_every": 2, "preview_samples": 1, "rank": 2, "sizes": "32x32"}

with torch.inference_mode():
    model, clip, vae = load_tiny(FOLDER)
    made = {}
    for how in ("off", "on"):
        with adapted(model, clip, vae) as host:
            settings = preset("Balanced", steps=2, streaming=how, **SMALL)
            made[how] = distil(host, ["a red dragon", "a wall"], settings, WORK / how, existing="stop")
    tensors = {how: read_tensors(result.path) for how, result in made.items()}
    previews = {how: [p.read_bytes() for p in sorted((WORK / how / "previews").iterdir())] for how in made}
    lines = {
        how: [{k: v for k, v in line.items() if k != "seconds"} for line in result.metrics]
        for how, result in made.items()
    }
    print(
        json.dumps(
            {
                "same": tensors["on"].keys() == tensors["off"].keys()
                and all(torch.equal(tensors["on"][name], value) for name, value in tensors["off"].items()),
                "previews": previews["on"] == previews["off"],
                "metrics": lines["on"] == lines["off"],
                "check": made["on"].check,
            }
        )
    )
