"""`Plan Distillation`: what a run needs of a card before it starts, as a table and a picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.model_management as management
import numpy as np
import torch
from comfy_api.latest import io, ui

from ..core.errors import OneStepError
from ..training.plan.cards import Card, card_of, found_card
from ..training.plan.ladder import planned
from ..training.plan.picture import bar
from ..training.plan.text import told
from ..training.runs.config import SECOND_ORDER
from ..training.settings import Settings
from .distil import preset_input, steps_input
from .distil import settings_of as of_lora
from .places import shown
from .shell import Shell
from .train_adapter import settings_of as of_adapter
from .trainer import makers_of, methods_told, run_inputs, sizes_input
from .widgets import BY_PRESET, method_input


class PlanDistillation(io.ComfyNode):  # type: ignore[misc]
    """Counts a run of the plugged model, on any machine, from its shapes alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = [*makers_of("LoRA"), *makers_of("adapter")]
        return io.Schema(
            node_id="OneStepPlan",
            display_name="Plan Distillation",
            category="OneStep/training",
            description="What Distil One-Step LoRA or Train Adapter would need of a graphics card with these settings, "
            "and what would make it fit: counted in a minute, on any machine. Nothing is trained.",
            search_aliases=["memory", "vram", "estimate", "fit", "card"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="What would be distilled. Its shapes are read, its weights are not."),
                io.String.Input(
                    "card", default="", tooltip="A size, like 12GB, or a name, like RTX 3060; empty = the card here."
                ),
                preset_input(),
                steps_input(),
                sizes_input(),
                method_input(names, BY_PRESET, methods_told(names)),
                io.Vae.Input("vae", optional=True, tooltip="Counts the decoding of previews too."),
                *run_inputs({"student_steps"})[1:],
            ],
            outputs=[
                io.String.Output(display_name="plan", tooltip="The table of rungs, and what a run would do."),
                io.Image.Output(display_name="memory", tooltip="The card's memory as a bar."),
            ],
        )

    @classmethod
    def validate_inputs(cls, card: Any = None, *, method: Any = None) -> bool | str:
        try:
            if isinstance(card, str) and card.strip():
                card_of(card)
        except OneStepError as error:
            return shown(str(error))
        return True

    @classmethod
    def execute(
        cls, model: Any, card: str, preset: str, method: dict[str, Any], vae: Any = None, **widgets: Any
    ) -> io.NodeOutput:
        settings = replace(settings_of(method, preset, **widgets), second_order=SECOND_ORDER)
        shell = Shell(model, vae, settings.targets)
        plan = planned(shell.name, shell.shell, settings, card_of(card) if card.strip() else here())
        text, picture = told(plan), torch.from_numpy(np.array(bar(plan), np.float32) / 255)[None]
        return io.NodeOutput(text, picture, ui=ui.PreviewText(text))


def settings_of(method: dict[str, Any], preset: str, **widgets: Any) -> Settings:
    """As the trainer of what is made has them: one of adapters knows no preset, and draws in its own steps."""
    if method["method"] in makers_of("adapter"):
        widgets.pop("student_steps", None)
        return of_adapter(method, **widgets)
    return of_lora(method, preset, **widgets)


def here() -> Card | None:
    """The card that ComfyUI trains on."""
    return found_card(management.get_torch_device())


NODES = [PlanDistillation]
