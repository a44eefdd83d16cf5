"""Public few-step files by their names: the presets that their authors' names stand for."""

from __future__ import annotations

import re

from .presets import PRESETS

# (what the lower-case name matches, the preset, of which N is the number of steps in the name)
NAMES = (
    (r"lightning.*?(?P<n>\d+)[ _-]?steps?", "sdxl-lightning-{n}"),
    (r"hyper[ _-]?sd(?!3).*?(?P<n>\d+)[ _-]?steps?(?!.*cfg)", "hyper-sd-{n}-lora"),
    (r"dmd2.*?(?P<n>\d+)[ _-]?steps?", "dmd2-{n}"),
    (r"\blcm[ _-]?lora", "lcm-4"),
    (r"\btcd\b|tcd[ _-](?:sd|lora)", "tcd-4"),
)


def preset_by_name(file: str) -> str | None:
    """The preset of a file like "sdxl_lightning_4step_lora.safetensors"; None where its name does not decide.

    Names are those of ByteDance/SDXL-Lightning, ByteDance/Hyper-SD, tianweiy/DMD2, latent-consistency and h1t/TCD.
    """
    name = file.lower().replace("_", "-")
    for pattern, preset in NAMES:
        found = re.search(pattern, name)
        if found:
            chosen = preset.format(n=found.groupdict().get("n"))
            return chosen if chosen in PRESETS else None
    return None
