"""`Train Adapter`: an adapter that gives a few-step model guidance, a negative prompt or a control."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.adapter_file import read_told
from ..core.controls import CONTROLS
from ..core.own_control import Examples
from ..training.methods import settings_for
from ..training.runs.run import CONTINUE
from .places import ADAPTERS, LORAS, named_places, path_of, publish
from .progress import as_image, loss_map
from .trainer import (
    HIDDEN,
    NO_LORA,
    FileName,
    TrainerNode,
    lora_input,
    makers_of,
    methods_told,
    model_inputs,
    name_input,
    run_inputs,
    seen,
    shared_outputs,
    sizes_input,
)
from .widgets import given, method_input

# The kind in a file's header -> the node that loads such an adapter.
LOADERS = {
    **dict.fromkeys(("guidance-cross-attention", "guidance-offset"), "Apply Guidance Adapter"),
    "negative-attention": "Apply Negative Adapter",
    **dict.fromkeys(("control", "control copy"), "Load Control Adapter"),
}
UNWATCHED = {"watch_every": 0, "preview_every": 0}


class TrainAdapter(TrainerNode):
    """Train an adapter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = makers_of("adapter")
        return io.Schema(
            node_id="OneStepTrainAdapter",
            display_name="Train Adapter",
            category="OneStep/training",
            description="Trains an adapter from prompts alone: agd for guidance at CFG 1, sun for a negative prompt, "
            "nct for a control. Cancel keeps what is learnt; queue again with 'continue' to go on.",
            search_aliases=["guidance adapter", "control adapter", "negative adapter", "agd", "sun", "nct", "train"],
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                *model_inputs(),
                method_input(names, None, methods_told(names)),
                lora_input(),
                sizes_input(),
                name_input("my-adapter", "models/onestep"),
                *run_inputs({"student_steps", "rank", "initial_recipe"}),
            ],
            outputs=[
                FileName.Output(
                    display_name="file",
                    tooltip="The result's name, for Apply Guidance Adapter (agd), Apply Negative Adapter (sun) or Load "
                    "Control Adapter (nct).",
                ),
                *shared_outputs(),
            ],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        prompts: str,
        name: str,
        method: dict[str, Any],
        existing: str = CONTINUE,
        **widgets: Any,
    ) -> io.NodeOutput:
        with named_places():
            result = cls.train(model, clip, vae, prompts, name, existing, settings_of(method, **widgets))
            file = publish(result.path, name, ADAPTERS)
        loader = LOADERS.get((read_told(result.path) or {}).get("kind", ""), "its own node")
        made = (file, as_image(result.preview), loss_map(result.metrics))
        return io.NodeOutput(*made, ui=seen(result, file, f"load it with {loader}"))


def settings_of(method: dict[str, Any], initial_lora: str = NO_LORA, **shared: Any) -> Any:
    """What the widgets set. method: {"method": its name, and its own settings}."""
    changes = given({**shared, **method})
    if initial_lora != NO_LORA:
        changes["initial_lora"] = str(path_of(initial_lora, LORAS))
    control = CONTROLS.get(changes.get("control", ""))
    if control is not None and isinstance(control.extract, Examples):
        # measures and previews would need a person's nodes for pictures that are not drawn yet
        changes |= UNWATCHED
    return settings_for(**changes)


NODES = [TrainAdapter]
