"""`Control Picture`: what a control adapter is told of a picture, by the extractor that it was trained with."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.controls import CONTROLS, control_of, visible

MASKED = 4
"""Channels of a control that holds a mask beside its picture: core has a node for that."""


class ControlPicture(io.ComfyNode):  # type: ignore[misc]
    """Take the control (edges, say) of a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepControlPicture",
            display_name="Control Picture",
            category="OneStep/guidance",
            description="Takes the control of a picture, exactly as method nct takes it in training: for Apply "
            "ControlNet with an adapter from Load Control Adapter.",
            search_aliases=["canny", "edges", "depth", "preprocessor", "nct"],
            inputs=[
                io.Image.Input("image", tooltip="The picture, in the size to be drawn: edges depend on it."),
                io.Combo.Input(
                    "control",
                    options=[name for name, control in CONTROLS.items() if control.channels < MASKED],
                    tooltip="What the adapter was trained on. For a mask use ControlNetInpaintingAliMamaApply instead.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="For Apply ControlNet.")],
        )

    @classmethod
    def execute(cls, image: Any, control: str) -> io.NodeOutput:
        found = control_of(control)(image[..., :3].movedim(-1, 1))
        return io.NodeOutput(visible(found).movedim(1, -1).contiguous())


NODES = [ControlPicture]
