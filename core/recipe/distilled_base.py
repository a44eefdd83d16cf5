"""A base that draws in few steps already, by what gives it away: it is no good teacher, and a fine donor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from .by_name import CAUSVID, HYPER, MODEL, NEVER, STEPS, normal, presets_by_name, word
from .recognised import names_of

FULL_LCM = re.compile(r"time_embed(?:ding)?\.cond_proj\.weight$")
"""A tensor of a U-Net that embeds its guidance (a full LCM, arXiv:2310.04378, Section 4.3)."""
KINDS = {
    "Lightning": word("lightning"),
    "Turbo": word("turbo"),
    "LCM": word("lcm"),
    "Hyper": HYPER,
    "DMD2": r"(?<![a-z])dmd-?2?(?![a-z])",
    "schnell": word("schnell"),
    "PCM": word("pcm"),
    "TCD": word("tcd"),
    "TDM": word("tdm"),
    "NitroSD": r"nitro-?(?:sd|fusion)",
    "SDXS": word("sdxs"),
    "Flash": r"(?<![a-z])flash-?sd|(?:sdxl|xl|hd)-?flash(?![a-z])|(?<![a-z])chroma.*(?<![a-z])flash(?![a-z])",
    "LightX2V": r"light-?x2-?v",
    "CausVid": CAUSVID,
    "distilled": word("distill?(?:ed)?"),
}
"""What checkpoints that draw in few steps are called after."""
OF_A_MODEL = re.compile(
    r"(?<![a-z])(?:ssd|sd|sdxl|xl|pony|illustrious|noob|flux|z-?image|qwen|krea|wan|chroma|anima|lumina)(?![a-z])"
    r"|xl(?![a-z])|\d-?(?:lcm|turbo|lightning|hyper|dmd)|(?:fp|bf|int)-?(?:4|8|16|32)(?!\d)|(?<![a-z])v-?\d"
    r"|vae|unet|baked|checkpoint|merge|(?<![a-z])mix"
)
"""What else a checkpoint's name holds, and a drawing's of a turbo engine does not."""


def few_step_kind(
    path: Path, metadata: Mapping[str, str] | None = None, tensors: Iterable[str] = ()
) -> tuple[str, str] | None:
    """(kind, evidence) of a checkpoint, a file or a diffusers folder, that draws in few steps already, as its names
    say, its header or the settings in its folder; None where nothing does."""
    for evidence, text in names_of(path, metadata or {}):
        if kind := _kind(text):
            return kind, evidence
    if any(FULL_LCM.search(name) for name in tensors):
        return "LCM", "the guidance that its U-Net embeds"
    return _of_folder(path) if path.is_dir() else None


def _kind(text: str) -> str | None:
    name = normal(text)
    if NEVER.search(name):
        return None
    known = presets_by_name(text, MODEL)
    if len(known) == 1:
        return known[0]
    kinds = [kind for kind, pattern in KINDS.items() if re.search(pattern, name)]
    return kinds[0] if kinds and (STEPS.search(name) or OF_A_MODEL.search(name)) else None


def _of_folder(path: Path) -> tuple[str, str] | None:
    """By the scheduler that a diffusers folder was published with, or what its pipeline is told of itself."""
    scheduler = str(_json(path / "scheduler" / "scheduler_config.json").get("_class_name", ""))
    if scheduler in ("LCMScheduler", "TCDScheduler"):
        return scheduler.removesuffix("Scheduler"), f"its {scheduler}"
    if _json(path / "model_index.json").get("is_distilled") is True:
        return "distilled", "is_distilled in its model_index.json"
    return None


def _json(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
