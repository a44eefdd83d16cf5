"""`Generator Pictures` and `Own Control`: train a control on what any other nodes make of the generator's pictures.

Method nct needs the control of pictures whose noise is known: the generator's own. So they are drawn first, other nodes
make their controls, and the run that draws the same pictures again finds them there.
"""

from __future__ import annotations

from typing import Any

import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..core.errors import OneStepError
from ..core.own_control import register_examples
from ..training.engine.prompts import lines
from ..training.methods import METHODS
from ..training.methods.generator_pictures import generator_pictures
from ..training.presets import preset
from ..training.settings import Settings, described
from .adapt import adapted
from .distil import NO_LORA, help_of
from .places import checked_name, stamp
from .settings import SettingsSocket


class GeneratorPictures(io.ComfyNode):  # type: ignore[misc]
    """Draw the pictures that a run of nct takes its controls of."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepGeneratorPictures",
            display_name="Generator Pictures",
            category="OneStep/training",
            description="Draws the pictures that Distil One-Step LoRA, method nct, takes controls of: for your own "
            "extractor, through any nodes, and then Own Control. Everything here must be as in that node.",
            search_aliases=["nct", "control", "dataset"],
            inputs=[
                io.Model.Input("model", tooltip="As in Distil One-Step LoRA."),
                io.Clip.Input("clip", tooltip="As in Distil One-Step LoRA."),
                io.Vae.Input("vae", tooltip="As in Distil One-Step LoRA."),
                io.String.Input(
                    "prompts", multiline=True, default="", dynamic_prompts=False, tooltip="As in Distil One-Step LoRA."
                ),
                io.Combo.Input(
                    "initial_lora",
                    options=[NO_LORA, *folder_paths.get_filename_list("loras")],
                    default=NO_LORA,
                    tooltip="The generator: the one-step LoRA that the control is for; none = the model itself.",
                ),
                io.String.Input("sizes", default="512x512", tooltip="One size. As in Distil One-Step LoRA."),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**53, control_after_generate=False, tooltip=help_of("seed")
                ),
                SettingsSocket.Input(
                    "settings", optional=True, tooltip="As in Distil One-Step LoRA: pairs is how many pictures."
                ),
            ],
            outputs=[io.Image.Output(display_name="pictures", tooltip="For your extractor, and for Own Control.")],
        )

    @classmethod
    def fingerprint_inputs(cls, initial_lora: str = "", **unused: Any) -> Any:
        return stamp(folder_paths.get_full_path("loras", initial_lora))

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        prompts: str,
        initial_lora: str,
        sizes: str,
        seed: int,
        settings: Any = None,
    ) -> io.NodeOutput:
        lora = "" if initial_lora == NO_LORA else folder_paths.get_full_path_or_raise("loras", initial_lora)
        told = {"method": "nct", "sizes": sizes, "seed": seed, "initial_lora": lora}
        known = {entry.name for kind in (Settings, METHODS["nct"].settings) for entry in described(kind)}
        chosen = preset("Fast", **{**{n: v for n, v in (settings or {}).items() if n in known}, **told})
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
            description="What your own nodes made of Generator Pictures, as the control that Distil One-Step LoRA, "
            "method nct, trains.",
            search_aliases=["nct", "control", "extractor", "preprocessor", "pairs"],
            inputs=[
                io.Image.Input("pictures", tooltip="From Generator Pictures, all of them, in their order."),
                io.String.Input("name", default="my-control", tooltip="What the control is called."),
                io.Image.Input("controls", optional=True, tooltip="The control of each picture: of any size."),
                io.Mask.Input("masks", optional=True, tooltip="Instead of controls: a mask of each picture."),
                SettingsSocket.Input(
                    "settings", optional=True, tooltip="From Distillation Settings: the finer settings of the run."
                ),
            ],
            outputs=[
                SettingsSocket.Output(
                    display_name="settings",
                    tooltip="For Distil One-Step LoRA, method nct. Without measures and previews: they would need your "
                    "nodes for pictures that are not drawn yet.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, pictures: Tensor, name: str, controls: Any = None, masks: Any = None, settings: Any = None
    ) -> io.NodeOutput:
        if (controls is None) == (masks is None):
            raise OneStepError("Own Control takes controls or masks: plug in one of them")
        found = masks[:, None] if controls is None else channels_of(controls[..., :3].movedim(-1, 1))
        known = register_examples(checked_name(name), pictures[..., :3].movedim(-1, 1), found)
        return io.NodeOutput({**(settings or {}), "control": known, "watch_every": 0, "preview_every": 0})


def channels_of(controls: Tensor) -> Tensor:
    """One channel where the three are the same."""
    return controls[:, :1] if bool((controls == controls[:, :1]).all()) else controls


NODES = [GeneratorPictures, OwnControl]
