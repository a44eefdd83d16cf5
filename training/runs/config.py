"""The config by which a run is known again."""

from __future__ import annotations

import hashlib
import platform
from typing import Any

import torch

from ..host import Host
from ..settings import Settings
from .files import content_of


def config_of(host: Host, prompts: list[str], settings: Settings) -> dict[str, Any]:
    """By what a run is known again: settings, prompts and base, and the initial LoRA by what is in its file, wherever
    that lies; and where it was run."""
    initial = {"initial_lora": content_of(settings.initial_lora)} if settings.initial_lora else {}
    return {
        "settings": settings.flat() | initial,
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "base": host.base_hash,
        "checkpoint": host.name,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "device": str(host.device),
    }
