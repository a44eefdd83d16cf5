"""What a run hands its method as it begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...core.denoiser import Denoiser
from ...core.recipe import Recipe
from ..host import Host
from ..settings import Settings
from .prompts import Prompts


@dataclass(frozen=True)
class Setup:
    """prompts: embedded. folder: the run's; a method keeps what it makes in a folder of its own there. recipe: how the
    student draws."""

    host: Host
    settings: Settings
    prompts: Prompts
    folder: Path
    recipe: Recipe

    @property
    def denoise(self) -> Denoiser:
        return self.host.denoiser
