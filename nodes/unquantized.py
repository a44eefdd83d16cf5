"""A LoRA that was trained on a quantised MODEL, on the same model unquantised: how far the two are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..core.stored import stored_as
from ..training.evaluation.storage import Predictions, apart, predictions, refuse_other, tried
from ..training.settings import Settings
from .adapt import ComfyHost, adapted
from .shell import Shell
from .stored import refuse_broken, refuse_foreign


def unquantized_input() -> Any:
    return io.Model.Input(
        "unquantized_model",
        optional=True,
        tooltip="Where model is stored in fp8 or less: the same model in 16 or 32 bits, with the same LoRAs. "
        "At the end the LoRA is checked on it.",
    )


@dataclass
class StorageCheck:
    """What the LoRA of a run is on ``model``, the base of that run unquantised; None where none is plugged in.

    stored: how the base of the run is stored, "" where it is not quantised. found: the predictions there.
    """

    model: Any | None
    stored: str = ""
    found: Predictions | None = None
    why: str = ""

    def refuse_other(self, host: ComfyHost, settings: Settings) -> None:
        """Before anything is trained: whether it is the same model."""
        self.stored = stored_as(host.network)
        if self.model is not None:
            refuse_foreign(self.model.model.diffusion_model)
            refuse_broken(self.model.model.diffusion_model)
            refuse_other(host, Shell(self.model, None, settings.targets))

    def look(self, host: ComfyHost, lora: Path, prompts: Sequence[str], settings: Settings) -> None:
        """At ``lora`` on the base that it was trained on, while that is there."""
        if self.model is not None:
            size = settings.size_list[0]
            self.found, self.why = tried(lambda: predictions(host, lora, prompts, size))

    def told(self, clip: Any, vae: Any, lora: Path, prompts: Sequence[str], settings: Settings) -> list[str]:
        """A line, or none where there is nothing to say. The base of the run is off the card by now."""
        if self.model is None:
            stored = f"the base is stored in {self.stored}: how far it is from the unquantised one is told where that"
            return [f"{stored} is plugged into unquantized_model"] if self.stored else []
        if self.found is None:
            return [self.why]
        mine = self.found

        def compared() -> str:
            with adapted(self.model, clip, vae, targets=settings.targets) as host:
                return apart(mine, predictions(host, lora, prompts, settings.size_list[0])).told()

        told, why = tried(compared)
        return [told or why]
