"""FastGen's own DMD2 step on SDXL's layout, where its checkout lies in a folder FastGen beside this file and what it
imports is there; README.md here says what. Random weights, no discriminator, as our update has none."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from part import Run, seconds, whole_peak

from onestep.pipelines.shells import CONFIGS

CHECKOUT = Path(__file__).resolve().parent / "FastGen"
SMALL = {
    **{"block_out_channels": [32, 64, 64], "transformer_layers_per_block": 1, "attention_head_dim": 8},
    **{"cross_attention_dim": 32, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64},
}
CRITIC, STUDENT = 1, 0
"""Indices of updates of each: every fifth is the student's."""


def update(run: Run) -> Sequence[Any]:
    """Seconds and peak of one turn of each, after one of each that does not count."""
    if importlib.util.find_spec("fastgen") is None and CHECKOUT.is_dir():
        sys.path.append(str(CHECKOUT))
    if importlib.util.find_spec("fastgen") is None:
        return ["not carried: README.md says what it needs"]
    with tempfile.TemporaryDirectory() as folder:
        model, data = made(run, Path(folder))

    def turns() -> None:
        for index in (CRITIC, STUDENT):
            with model.autocast():
                losses, _ = model.single_train_step(data, index)
            losses["total_loss"].backward()
            model.optimizers_schedulers_step(index)
            model.optimizers_zero_grad(index)

    turns()
    peak = whole_peak(run.device, turns)
    return statistics.median(seconds(run.device, turns) for _ in range(1 if run.tiny else 3)), peak / 1e9


def made(run: Run, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Its model by its own configuration of SDXL, and a batch of one."""
    os.environ.setdefault("HF_HOME", str(folder))
    os.environ["LOCAL_FILES_ONLY"] = "true"
    from diffusers import DDIMScheduler

    theirs = importlib.import_module("fastgen.configs.experiments.SDXL.config_dmd2")
    kind = importlib.import_module("fastgen.methods").DMD2Model

    told = json.loads((CONFIGS / "sdxl" / "unet" / "config.json").read_text(encoding="utf-8"))
    told |= SMALL if run.tiny else {}
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(json.dumps(told), encoding="utf-8")
    config = theirs.create_config().model
    config.net = {**config.net, "model_id": str(folder), "load_pretrained": False}
    config.device, config.precision_amp, config.gan_loss_weight_gen = str(run.device), "bfloat16", 0.0
    side = 16 if run.tiny else 128
    config.input_shape = [4, side, side]
    schedule = DDIMScheduler.from_config(DDIMScheduler.load_config(CONFIGS / "sdxl" / "scheduler"))
    with patch.object(DDIMScheduler, "from_pretrained", lambda *args, **more: schedule):  # it asks a hub by name
        model = kind(config)
    model.on_train_begin()
    model.init_optimizers()
    return model, _batch(run, side, told)


def _batch(run: Run, side: int, told: dict[str, Any]) -> dict[str, Any]:
    pooled = told["projection_class_embeddings_input_dim"] - 6 * told["addition_time_embed_dim"]
    texts = [torch.randn(1, *shape, device=run.device) for shape in ((77, told["cross_attention_dim"]), (pooled,))]
    negatives = [torch.zeros_like(text) for text in texts]
    return {"real": torch.randn(1, 4, side, side, device=run.device), "condition": texts, "neg_condition": negatives}
