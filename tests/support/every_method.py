"""What each method of the registry is tried with: a run that goes through each of its phases within seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from own_pictures import needed_by
from small_host import SmallHost
from tiny_pipelines import sd

from onestep.pipelines.adapt import adapt
from onestep.training.methods import METHODS
from onestep.training.settings import described

ON_ATTENTION = ("agd", "guided-distillation", "sun")
"""Whose adapters sit at a U-Net's cross-attentions."""
SHORT: dict[str, Any] = {
    **{"warm_start": 2, "critic_warm_up": 1, "critic_updates": 2, "anchor": 0.5, "head_warm_up": 1, "head_blocks": 2},
    **{"twin_warm_up": 1},
    **{"gan_weight": 1.0, "gan_start": 0.0, "gan_ramp": 0.0, "generator_steps": 2, "noise_levels": 2, "states": 2},
    **{"control": "soft-edges", "control_width": 8, "segment_steps": 2, "negatives": "people, blurry"},
    **{"solver_steps": 8, "stride": 2, "halvings": 2, "levels_first": 2, "levels_last": 8},
}
"""Of these each method takes what it has."""
OF_METHOD: dict[str, dict[str, Any]] = {
    **{name: {"student_steps": 2} for name in ("cdm", "tdm", "phased-dmd", "pcm", "tcd", "mlcm", "tscd")},
    **{"tscd": {"student_steps": 2, "segments": "2,1"}, "mlcm": {"student_steps": 2, "segments": "2,1"}},
    **{"sun": {"sizes": "16x16", "pairs": 4}, "f-distill": {"divergence": "kl"}},
    "sid": {"guidance_strategy": "long-short"},
    "disback": {"critic_warm_up": 2, "snapshots": 2},
    "msd": {"students": 2},
    "sfd": {"forget": "birds", "instead": "dogs"},
}


def short(method: str, folder: Path) -> dict[str, Any]:
    """Settings of such a run; ``folder`` is for what a person would give it."""
    own = {entry.name for entry in described(METHODS[method].settings)}
    told = {name: value for name, value in SHORT.items() if name in own}
    return {"method": method} | told | OF_METHOD.get(method, {}) | needed_by(method, folder)


def host_of(method: str) -> Any:
    """A model that the method serves."""
    if method not in ON_ATTENTION:
        return SmallHost()
    torch.manual_seed(0)
    return adapt(sd(), device="cpu")
