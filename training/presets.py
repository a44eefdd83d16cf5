"""Presets: settings that do well together, by the outcome that a person wants. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import OneStepError
from .methods import METHODS, settings_for
from .settings import Settings, described, nearest

DEFAULT = "Overnight"
"""Four steps are what a night on one card buys for a model of SDXL's size."""
LENGTH = ("steps", "pairs")
"""What an adapter takes of a preset, which is of LoRAs."""


@dataclass(frozen=True)
class Preset:
    """about: what it is made of, and for whom, in words. values: its changes to the defaults. with_donor: more of them
    where the run has an initial LoRA."""

    about: str
    values: Mapping[str, Any]
    with_donor: Mapping[str, Any] = field(default_factory=dict)


# From a donor: anima_lora's warm start has 1e-5 and 2e-5 at batch 1, here by the square root of batch 4.
DONOR_RATES = {"learning_rate": 2e-5, "critic_learning_rate": 4e-5}
FROM_DONOR = {"warm_start": 0, "anchor": 0.0, "critic_start": "donor", **DONOR_RATES}
# Cold, of several steps: DMD2's LoRA and anima_lora have 5e-5 on both sides.
COLD_RATES = {"learning_rate": 5e-5, "critic_learning_rate": 5e-5}

# Our own measurements (benchmarks/results) are of one step on the bundled models: Balanced, Fast, Best and One step
# keep to them. Where they do not speak, for several steps and for donors, rates, ranks, warm-ups and ratios are those
# of recipes that exist as code, which each comment names.
PRESETS: dict[str, Preset] = {
    "Adapt": Preset(
        "You have a public few-step LoRA (a donor: your initial_lora). Student and critic go on from it on your "
        "checkpoint, in its own steps: dmd, 750 updates.",
        # anima_lora's warm start: 750 updates, 4 of the critic for each, warm-ups of 50, k 4, floor 0.05
        {
            **{"method": "dmd", "steps": 750, **FROM_DONOR, "warm_up": 50, "critic_warm_up": 50, "critic_updates": 4},
            **{"matching_guidance": 4.0, "normaliser_floor": 0.05},
        },
    ),
    "Overnight": Preset(
        "Four steps from your checkpoint alone: cdm on random schedules, the first step held to the teacher's way "
        "(diversity anchor), 1500 updates of 8.",
        # CDM as LightX2V trains it: 2 critic updates, k 4, floor 0.1; its authors' merge (0.999) and warm-up of 100;
        # anima_lora's critic warm-up of 200 and its anchor of 0.05
        {
            **{"method": "cdm", "student_steps": 4, "steps": 1500, "batch": 8, "warm_start": 0, "anchor": 0.0},
            **{**COLD_RATES, "warm_up": 100, "critic_warm_up": 200, "critic_updates": 2, "follow": 1e-3},
            **{"matching_guidance": 4.0, "normaliser_floor": 0.1, "diversity_anchor": 0.05, "ema": 0.999},
        },
        {"critic_start": "donor", **DONOR_RATES},
    ),
    "Weekend": Preset(
        "Two steps, each with a LoRA of its own: a warm start on the teacher's pictures (none from a donor), then dmd, "
        "8000 updates of 8 at rank 128.",
        # rank 128 and more at one and two steps (anima_lora, pi-Flow's 256); LightX2V's 2 critic updates and k 4
        {
            **{"method": "dmd", "student_steps": 2, "step_loras": True, "steps": 8000, "batch": 8, "rank": 128},
            **{"warm_start": 500, "anchor": 0.0, **COLD_RATES, "warm_up": 100, "critic_warm_up": 200},
            **{"critic_updates": 2, "matching_guidance": 4.0, "normaliser_floor": 0.05, "ema": 0.999},
        },
        FROM_DONOR,
    ),
    "One step": Preset(
        "One step, from the best start there is: a one-step donor as initial_lora, else regression on the teacher's "
        "pictures; then dmd, 3000 updates. Soft on large models.",
        # Best, as measured here, at the rank that one step wants
        {
            **{"method": "dmd", "student_steps": 1, "steps": 3000, "warm_start": 1000, "critic_updates": 5},
            **{"pairs": 4096, "rank": 128},
        },
        FROM_DONOR,
    ),
    "Guidance only": Preset(
        "As many steps as ever, half the forwards: one guidance scale (the setting guidance) goes into a LoRA. For a "
        "dial take agd in Train Adapter.",
        {"method": "guidance-lora", "steps": 1000},
    ),
    "Tune": Preset(
        "A style or subject from your own pictures (the setting pictures), on a few-step model or on your student "
        "(initial_lora), its few steps kept.",
        {"method": "tune", "steps": 800, "rank": 32},
    ),
    # Fast is the warm start alone, Best matches for longer with a surer critic
    "Fast": Preset(
        "For small models, and to try things: regression on the teacher's pictures alone, 600 updates.",
        {"method": "regression", "steps": 600, "learning_rate": 5e-4},
    ),
    "Balanced": Preset(
        "For small models: regression, then dmd, 600 updates each.",
        {"method": "dmd", "steps": 600, "warm_start": 600},
    ),
    "Best": Preset(
        "For small models: Balanced for longer, with a surer critic.",
        {"method": "dmd", "steps": 3000, "warm_start": 1000, "critic_updates": 5, "pairs": 4096},
    ),
}


def preset_named(name: str) -> Preset:
    """The preset of this name; ``one-step`` is One step too. Raises OneStepError for an unknown one."""
    known = {key.lower(): made for key, made in PRESETS.items()}
    found = known.get(name.lower().replace("-", " ").replace("_", " "))
    if found is None:
        raise OneStepError(f"no preset {name!r:.60}{nearest(name, PRESETS)}")
    return found


def preset(name: str | None, **changes: Any) -> Settings:
    """The settings of a preset, with changes; an ``initial_lora`` among them is its donor. For another method than the
    preset's, its values for settings that this method has not are left out. None: the default preset, or where a method
    is named that method's own defaults. Raises OneStepError for an unknown name."""
    if name is None and "method" in changes:
        return settings_for(**changes)
    chosen = preset_named(name or DEFAULT)
    method = changes.get("method", chosen.values["method"])
    known = {"method", *(entry.name for entry in (*described(Settings), *described(METHODS[method].settings)))}
    started = {**chosen.values, **(chosen.with_donor if changes.get("initial_lora") else {})}
    if METHODS[method].makes == "adapter":
        known = set(LENGTH)
    values = {key: value for key, value in started.items() if key in known}
    return settings_for(**{**values, **changes})


def presets_told() -> str:
    """The presets, a line each."""
    return "\n".join(f"{name}: {made.about}" for name, made in PRESETS.items())
