"""What a run is known by: its config, to itself, and its files' header, to everybody."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

from ...core.families import FAMILIES
from ...core.licence_files import sources_of
from ...core.licences import INITIAL, Source, license_header, license_line
from ...core.recipe import Recipe
from ..engine.donor import predicts
from ..engine.inputs import base_note
from ..host import Host
from ..settings import Settings
from .files import content_of

SECOND_ORDER = True
"""Of runs that begin now: see `Settings.second_order`."""


def config_of(host: Host, prompts: list[str], settings: Settings, recipe: Recipe) -> dict[str, Any]:
    """By what a run is known again: settings, prompts, base and the student's recipe, and the initial LoRA by what is
    in its file, wherever that lies; and where it was run. The recipe may hang on the name of that file."""
    initial = {"initial_lora": content_of(settings.initial_lora)} if settings.initial_lora else {}
    return {
        "settings": settings.flat() | initial,
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "base": host.base_hash,
        "recipe": json.loads(recipe.to_json()),
        "checkpoint": host.name,
        "second_order": SECOND_ORDER,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "device": str(host.device),
    }


def header_of(host: Host, prompts: list[str], settings: Settings, title: str) -> dict[str, str]:
    """What a run's file tells of it, whatever role it holds."""
    header = {
        "onestep.settings": settings.to_json(),
        "onestep.base": host.base_hash,
        "ss_base_model_version": host.family,
        "ss_sd_model_name": host.name,
        "ss_learning_rate": str(settings.learning_rate),
        "ss_seed": str(settings.seed),
        "modelspec.title": title,
        "modelspec.resolution": settings.sizes.split(",")[0].strip(),
    }
    predicted = predicts(host)
    header |= {"modelspec.prediction_type": predicted} if predicted else {}
    header |= license_header(sources(host, settings))
    return header | ({"onestep.prompts": json.dumps(prompts)} if settings.keep_prompts else {})


def sources(host: Host, settings: Settings) -> list[Source]:
    """What a run's result is made of, with the licences: the base, its LoRAs, the initial LoRA."""
    path = Path(settings.initial_lora) if settings.initial_lora else None
    initial = [] if path is None else [(INITIAL, path.name, path)]
    return sources_of([*host.made_of, *initial], settings.licenses, FAMILIES[host.family].license)


def first_notes(host: Host, settings: Settings) -> list[str]:
    """What a run says of its base as it begins."""
    return [note for note in (base_note(host, settings), license_note(host, settings)) if note]


def license_note(host: Host, settings: Settings) -> str:
    """What a run says of it as it begins: nothing of a base alone of whose licence nothing is known."""
    found = sources(host, settings)
    return license_line(found) if len(found) > 1 or any(each.found or each.usual for each in found) else ""
