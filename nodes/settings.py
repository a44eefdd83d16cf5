"""`Distillation Settings`: every setting that Distil One-Step LoRA does not show itself, read from the dataclass."""

from __future__ import annotations

from dataclasses import Field
from typing import Any

from comfy_api.latest import io

from ..training.methods import METHODS
from ..training.settings import Settings, described

SettingsSocket = io.Custom("ONESTEP_SETTINGS")
# What the distil node shows itself.
SHOWN = {
    *("method", "steps", "student_steps", "rank", "sizes", "teacher_steps", "guidance", "seed", "negative"),
    "initial_lora",
}


def widget(entry: Field[Any]) -> Any:
    """A widget for one setting, with its help as the tooltip. Optional: saved graphs outlive settings that are new."""
    meta = entry.metadata
    told = {"default": entry.default, "tooltip": meta["help"], "optional": True}
    if meta["choices"]:
        return io.Combo.Input(entry.name, options=list(meta["choices"]), **told)
    if entry.type == "bool":
        return io.Boolean.Input(entry.name, **told)
    if entry.type == "int":
        return io.Int.Input(entry.name, min=int(meta["low"]), max=min(int(meta["high"]), 2**53), **told)
    if entry.type == "float":
        return io.Float.Input(entry.name, min=meta["low"], max=meta["high"], step=step_of(entry), round=False, **told)
    return io.String.Input(entry.name, **told)


def every() -> dict[str, Field[Any]]:
    """The settings of every run and of every method, by name."""
    kinds = [Settings, *dict.fromkeys(method.settings for method in METHODS.values())]
    return {entry.name: entry for kind in kinds for entry in described(kind)}


def step_of(entry: Field[Any]) -> float:
    """Fine enough for the default: 1e-05 for 1e-4, 0.01 for 0.99."""
    default: Any = entry.default
    return 1e-5 if 0 < default < 1e-2 else 0.001 if 0 < default < 1 else 0.01


class DistillationSettings(io.ComfyNode):  # type: ignore[misc]
    """The finer settings of a distillation. Connected, all of them replace the preset's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepDistillationSettings",
            display_name="Distillation Settings",
            category="OneStep/training",
            description="The finer settings of Distil One-Step LoRA. Connected, all values here replace those "
            "of its preset.",
            search_aliases=["advanced training settings", "learning rate"],
            inputs=[widget(entry) for entry in every().values() if entry.name not in SHOWN],
            outputs=[SettingsSocket.Output(display_name="settings", tooltip="For Distil One-Step LoRA.")],
        )

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(values)


NODES = [DistillationSettings]
