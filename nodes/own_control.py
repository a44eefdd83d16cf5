"""`Generator Pictures` and `Own Control`: train a control on what any other nodes make of the generator's pictures.

Method nct needs the control of pictures whose noise is known: the generator's own. So they are drawn first, other nodes
make their controls, and the run that draws the same pictures again finds them there.
"""

from __future__ import annotations

from typing import Any

import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..core.errors import OneStepError
from ..core.own_control import register_examples
from ..training.engine.prompts import lines
from ..training.methods import settings_for
from ..training.methods.generator_pictures import generator_pictures
from ..training.settings import Settings, described
from .adapt import adapted
from .places import LORAS, checked_name, named_places, path_of, stamp
from .trainer import NO_LORA, FileName, lora_input, model_inputs, sizes_input
from .widgets import given, widget

DRAWN_BY = ("pairs", "batch", "seed")
"""Settings on which it depends which pictures a run draws."""


class GeneratorPictures(io.ComfyNode):  # type: ignore[misc]
    """Draw the pictures that a run of nct takes its controls of."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        known = {entry.name: entry for entry in described(Settings)}
        return io.Schema(
            node_id="OneStepGeneratorPictures",
            display_name="Generator Pictures",
            category="OneStep/training",
            description="Draws the pictures that Train Adapter, method nct, takes controls of: for your own extractor, "
            "through any nodes, and then Own Control. Everything here must be as in that node; pairs is how many.",
            search_aliases=["nct", "control", "dataset"],
            inputs=[*model_inputs(), lora_input(), sizes_input(), *(widget(known[name]) for name in DRAWN_BY)],
            outputs=[io.Image.Output(display_name="pictures", tooltip="For your extractor, and for Own Control.")],
        )

    @classmethod
    def fingerprint_inputs(cls, initial_lora: Any = "", **unused: Any) -> Any:
        return stamp(initial_lora, LORAS)

    @classmethod
    def execute(
        cls, model: Any, clip: Any, vae: Any, prompts: str, sizes: str, initial_lora: str = NO_LORA, **widgets: Any
    ) -> io.NodeOutput:
        with named_places():
            lora = "" if initial_lora == NO_LORA else str(path_of(initial_lora, LORAS))
            chosen = settings_for("nct", sizes=sizes, initial_lora=lora, **given(widgets))
            bar = comfy.utils.ProgressBar(-(-chosen.pairs // chosen.batch))
            pictures = []
            with adapted(model, clip, vae, targets=chosen.targets) as host:
                for made in generator_pictures(host, lines(prompts), chosen):
                    pictures.append(made)
                    bar.update(1)
        return io.NodeOutput(torch.cat(pictures).movedim(1, -1).contiguous())


class OwnControl(io.ComfyNode):  # type: ignore[misc]
    """Pairs of picture and control, as a control that nct trains."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepOwnControl",
            display_name="Own Control",
            category="OneStep/training",
            description="What your own nodes made of Generator Pictures, as the control that Train Adapter, "
            "method nct, trains.",
            search_aliases=["nct", "control", "extractor", "preprocessor", "pairs"],
            inputs=[
                io.Image.Input("pictures", tooltip="From Generator Pictures, all of them, in their order."),
                io.String.Input("name", default="my-control", tooltip="What the control is called."),
                io.Image.Input("controls", optional=True, tooltip="The control of each picture: of any size."),
                io.Mask.Input("masks", optional=True, tooltip="Instead of controls: a mask of each picture."),
            ],
            outputs=[
                FileName.Output(
                    display_name="control",
                    tooltip="For control of Train Adapter, method nct. Such a run has no measures and previews: they "
                    "would need your nodes for pictures that are not drawn yet.",
                )
            ],
        )

    @classmethod
    def execute(cls, pictures: Tensor, name: str, controls: Any = None, masks: Any = None) -> io.NodeOutput:
        if (controls is None) == (masks is None):
            raise OneStepError("Own Control takes controls or masks: plug in one of them")
        found = masks[:, None] if controls is None else channels_of(controls[..., :3].movedim(-1, 1))
        known = register_examples(checked_name(name), pictures[..., :3].movedim(-1, 1), found)
        return io.NodeOutput(known)


def channels_of(controls: Tensor) -> Tensor:
    """One channel where the three are the same."""
    return controls[:, :1] if bool((controls == controls[:, :1]).all()) else controls


NODES = [GeneratorPictures, OwnControl]
