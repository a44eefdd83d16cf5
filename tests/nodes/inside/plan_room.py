"""plan_room.py FOLDER RUN: a run in ComfyUI beside a card, which is told and not there. What ComfyUI is asked to make
room for, what the run has counted, and whether a back end that ONESTEP_ATTENTION names is what the network is trained
with."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import comfy.model_management as management
import torch

import onestep.nodes.attention as served
from onestep.nodes.adapt import adapted
from onestep.nodes.shell import shells_of
from onestep.nodes.tiny_models.model import load_tiny
from onestep.training import distil as training
from onestep.training.methods import settings_for
from onestep.training.plan.cards import card_of

SMALL = {
    "batch": 2,
    "pairs": 2,
    "teacher_steps": 2,
    "watch_samples": 4,
    "preview_every": 0,
    "rank": 2,
    "sizes": "32x32",
}
asked, learnt = [], []
load, attention = management.load_models_gpu, served.attention


def loading(models, *args, memory_required=0, **more):
    if training_now():
        asked.append(memory_required)
    return load(models, *args, memory_required=memory_required, **more)


def training_now():
    return management.in_training


def attending(q, k, v, mask=None):
    learnt.append(torch.is_grad_enabled() and q.requires_grad)
    return attention(q, k, v, mask)


management.load_models_gpu, served.attention = loading, attending
training.laid_out = partial(training.laid_out, find=lambda device: card_of("8GB"))
os.environ["ONESTEP_ATTENTION"] = "reference"
with torch.inference_mode():
    model, clip, vae = load_tiny(Path(sys.argv[1]))
    settings = settings_for(method="regression", steps=1, **SMALL)
    with adapted(model, clip, vae) as host:
        training.distil(host, ["a red dragon"], settings, Path(sys.argv[2]), shells=shells_of(model, vae, "all"))
counted = json.loads((Path(sys.argv[2]) / "config.json").read_text(encoding="utf-8"))["plan"]["beyond"]
print(json.dumps({"asked": asked, "counted": counted, "learnt": sum(learnt), "calls": len(learnt)}))
