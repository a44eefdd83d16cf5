"""onestep.distill: from a loaded diffusers pipeline and prompts to a one-step LoRA, in one call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..core.errors import OneStepError
from ..training import presets
from ..training.distil import Report, Result, distil
from ..training.engine.prompts import check_prompts, read_prompts
from ..training.methods.rewards import Reward, given
from ..training.settings import Settings
from .adapt import adapt
from .agreement import read_for
from .load import best_device, load
from .shells import of_host


def distill(
    pipe: Any,
    prompts: Sequence[str] | Path,
    method: str | None = None,
    *,
    out: str | Path = "runs/onestep",
    preset: str | None = None,
    existing: str = "stop",
    device: torch.device | str | None = None,
    report: Report | None = None,
    rewards: Mapping[str, Reward] | None = None,
    **settings: Any,
) -> Result:
    """Distil a loaded pipeline, or MODEL as `load` takes it, on ``prompts`` into ``out``/result.safetensors.

    prompts: 200 to 1000 that you would really use, or a file with one a line. preset: the outcome that you want, of
    `training.presets`; Overnight where nothing is said. method: in place of the preset's; without one, with that
    method's own defaults.
    existing: "continue" (with other steps and pairs than it had, if you like), "restart" or "stop" where ``out``
    already holds a run. report: called with a `Progress` before the first update and after each; True after one ends
    the run early. device: where it trains; by default where the pipeline lies, and a path goes to the GPU where there
    is one. rewards: functions of your own, by the names that the setting reward has for them: each takes pictures
    [B, 3, H, W] in [0, 1] and their prompts and gives [B] with a gradient, more is better (`training.methods.rewards`);
    a run that is continued is given them again. settings: fields of `training.settings.Settings` (steps, rank, seed
    ...); sizes is the model's own where it is not given. The pipeline is given back as it was.
    Raises OneStepError for bad input before anything is written.
    """
    chosen = _settings(method, preset, settings)
    texts = _prompts(prompts)
    if isinstance(pipe, str | Path):
        device = device or best_device()
        pipe = load(pipe, device=device, stored=True, waiting=chosen.streaming != "off")
    host = adapt(pipe, targets=chosen.targets, device=device)
    try:
        if "sizes" not in settings:
            chosen = _settings(method, preset, {**settings, "sizes": "{}x{}".format(*host.native_size)})
        with given({**read_for(chosen), **(rewards or {})}):
            return distil(host, texts, chosen, out, existing=existing, report=report, shells=partial(of_host, host))
    finally:
        host.release()


def _settings(method: str | None, name: str | None, changes: dict[str, Any]) -> Settings:
    # a path is a text here, as in Result.path given for initial_lora
    plain = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in changes.items()}
    return presets.preset(name, **({"method": method} if method else {}), **plain)


def _prompts(prompts: Sequence[str] | Path) -> list[str]:
    if isinstance(prompts, Path):
        return read_prompts(prompts)
    if isinstance(prompts, str):
        raise OneStepError("prompts is one text: give a list of prompts, or a pathlib.Path of a file with one a line")
    return check_prompts(prompts)
