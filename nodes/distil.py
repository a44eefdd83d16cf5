"""`Distil One-Step LoRA`: a whole distillation as one node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.router import run_files
from ..core.tensor_file import read_tensors
from ..training import presets
from ..training.engine.prompts import lines
from ..training.presets import preset
from ..training.runs.run import CONTINUE
from .load_lora import RecipeSocket
from .places import LORAS, PICTURES, named_places, path_of, pictures_folder, publish, publish_second
from .progress import as_image, loss_map
from .trainer import (
    HIDDEN,
    NO_LORA,
    FileName,
    TrainerNode,
    help_of,
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
from .unquantized import StorageCheck, unquantized_input
from .widgets import BY_PRESET, given, method_input


def preset_input() -> Any:
    tooltip = f"The outcome you want.\n{presets.presets_told()}"
    return io.Combo.Input("preset", options=list(presets.PRESETS), default=presets.DEFAULT, tooltip=tooltip)


def steps_input() -> Any:
    options = [BY_PRESET, "1", "2", "4"]
    return io.Combo.Input("student_steps", options=options, default=BY_PRESET, tooltip=help_of("student_steps"))


def first_inputs() -> list[Any]:
    """What a person sets."""
    names = makers_of("LoRA")
    return [
        preset_input(),
        steps_input(),
        sizes_input(),
        name_input("my-one-step", "models/loras/onestep"),
        method_input(names, BY_PRESET, methods_told(names)),
    ]


class DistilOneStepLoRA(TrainerNode):
    """Distil the plugged model into a LoRA that makes it draw in one step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepDistil",
            display_name="Distil One-Step LoRA",
            category="OneStep/training",
            description="Trains a LoRA with which the model draws in one, two or four steps, from prompts "
            "alone. Cancel keeps what is learnt; queue again with 'continue' to go on, also with more steps.",
            search_aliases=["distillation", "train", "turbo", "few step", "lightning", "dmd", "train lora"],
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                *model_inputs(),
                *first_inputs(),
                lora_input(advanced=True),
                *run_inputs({"student_steps"}),
                unquantized_input(),
            ],
            outputs=[
                io.LoraModel.Output(display_name="lora", tooltip="For Load LoRA Model and Save LoRA."),
                FileName.Output(
                    display_name="file", tooltip="The result's name, for the list of files in any LoRA loader."
                ),
                RecipeSocket.Output(display_name="recipe", tooltip="How to sample it, for One-Step Sample."),
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
        preset: str,
        existing: str = CONTINUE,
        unquantized_model: Any | None = None,
        **widgets: Any,
    ) -> io.NodeOutput:
        with named_places():
            settings, check = settings_of(method, preset, **widgets), StorageCheck(unquantized_model)
            result = cls.train(model, clip, vae, prompts, name, existing, settings, check)
            file = publish(result.path, name, LORAS)
            for path in run_files(result.path, result.recipe)[1:]:
                publish(path, name + path.stem.removeprefix(result.path.stem), LORAS)
            publish_second(result.path, name, result.recipe)
            said = check.told(clip, vae, result.path, lines(prompts), settings)
        made = (read_tensors(result.path), file, result.recipe, as_image(result.preview), loss_map(result.metrics))
        return io.NodeOutput(*made, ui=seen(result, file, *said))


def settings_of(method: dict[str, Any], name: str, initial_lora: str = NO_LORA, **shared: Any) -> Any:
    """The preset ``name``, then what the widgets set. method: {"method": its name, and its own settings}."""
    changes = given({**shared, **method})
    if "student_steps" in changes:
        changes["student_steps"] = int(changes["student_steps"])
    if initial_lora != NO_LORA:
        changes["initial_lora"] = str(path_of(initial_lora, LORAS))
    for setting in PICTURES:
        if setting in changes:
            changes[setting] = str(pictures_folder(changes[setting], setting))
    return preset(name, **changes)


NODES = [DistilOneStepLoRA]
