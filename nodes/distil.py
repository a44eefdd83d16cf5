"""`Distil One-Step LoRA`: the whole distillation as one node."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker

from ..core.adapter_file import read_told
from ..core.tensor_file import read_tensors
from ..training.distil import Result, distil
from ..training.engine.prompts import check_prompts, lines
from ..training.methods import METHODS
from ..training.presets import PRESETS
from ..training.presets import preset as of_preset
from ..training.runs.run import CONTINUE, RESTART, STOP
from ..training.settings import Settings, described
from .adapt import adapted
from .finish import running
from .load_lora import RecipeSocket
from .places import checked_name, publish, run_folder
from .progress import Reporter, as_image, loss_map, viewed
from .settings import SettingsSocket

BY_PRESET = "by preset"
NO_LORA = "none"
# A name that fits text inputs and the lists of files alike.
FileName = io.Custom("STRING,COMBO")
# The kind in a file's header -> the node that loads such an adapter.
LOADERS = {
    **dict.fromkeys(("guidance-cross-attention", "guidance-offset"), "Apply Guidance Adapter"),
    "negative-attention": "Apply Negative Adapter",
    **dict.fromkeys(("control", "control copy"), "Load Control Adapter"),
}


def help_of(name: str) -> str:
    """A setting's own help."""
    return str(Settings.__dataclass_fields__[name].metadata["help"])


def methods_told() -> str:
    """The methods, a line each."""
    return "\n".join(["How the student learns.", *(f"{name}: {method.title}." for name, method in METHODS.items())])


def model_inputs() -> list[Any]:
    return [
        io.Model.Input(
            "model", tooltip="The teacher: LoRAs and ModelSampling patches on it are part of it. It stays as it is."
        ),
        io.Clip.Input("clip", tooltip="Encodes the prompts once, before training."),
        io.Vae.Input("vae", tooltip="Decodes the previews."),
        io.String.Input(
            "prompts",
            multiline=True,
            default="",
            dynamic_prompts=False,
            tooltip="One prompt a line, or from Prompt List: what the student learns to draw. No pictures are needed.",
        ),
        io.String.Input("negative", multiline=True, default="", dynamic_prompts=False, tooltip=help_of("negative")),
    ]


def plan_inputs() -> list[Any]:
    return [
        io.Combo.Input("method", options=[BY_PRESET, *METHODS], default=BY_PRESET, tooltip=methods_told()),
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            default="Balanced",
            tooltip="Fast: regression on the teacher's pairs. Balanced: that, then distribution matching. Best: "
            "longer, with a surer critic.",
        ),
        io.Int.Input("steps", default=0, min=0, max=1_000_000, tooltip=help_of("steps") + " 0 = the preset's."),
        io.Combo.Input("student_steps", options=["1", "2", "4"], default="1", tooltip=help_of("student_steps")),
        io.Int.Input("rank", default=64, min=1, max=512, tooltip=help_of("rank")),
        io.String.Input("sizes", default="512x512", tooltip=help_of("sizes")),
        io.Int.Input("teacher_steps", default=20, min=1, max=1000, tooltip=help_of("teacher_steps")),
        io.Float.Input("guidance", default=4.0, min=0.0, max=30.0, step=0.1, tooltip=help_of("guidance")),
        io.Int.Input("seed", default=0, min=0, max=2**53, control_after_generate=False, tooltip=help_of("seed")),
    ]


def run_inputs() -> list[Any]:
    return [
        io.String.Input("name", default="my-one-step", tooltip="Of the run and of its result in models/loras/onestep."),
        io.Combo.Input(
            "existing",
            options=[CONTINUE, RESTART, STOP],
            default=CONTINUE,
            tooltip="Where a run of this name is there: go on from its last state (same settings, but for "
            "steps and pairs), begin anew, or stop with a word.",
        ),
        io.Combo.Input(
            "initial_lora",
            options=[NO_LORA, *folder_paths.get_filename_list("loras")],
            default=NO_LORA,
            tooltip=help_of("initial_lora"),
        ),
        SettingsSocket.Input(
            "settings", optional=True, tooltip="From Distillation Settings: replaces the preset's finer values."
        ),
    ]


class DistilOneStepLoRA(io.ComfyNode):  # type: ignore[misc]
    """Distil the plugged model into a LoRA that makes it draw in one step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepDistil",
            display_name="Distil One-Step LoRA",
            category="OneStep/training",
            description="Trains a LoRA with which the model draws in one, two or four steps, from prompts "
            "alone; by method agd an adapter for guidance at CFG 1, by sun one for a negative prompt, by nct one for a "
            "control. Cancel keeps what is learnt; queue again with 'continue' to go on, also with more steps.",
            search_aliases=["distillation", "train", "turbo", "few step", "guidance adapter", "control adapter", "sun"],
            is_output_node=True,
            not_idempotent=True,
            inputs=[*model_inputs(), *plan_inputs(), *run_inputs()],
            outputs=[
                io.LoraModel.Output(
                    display_name="lora",
                    tooltip="For Load LoRA Model and Save LoRA. Methods that train an adapter have none: use file.",
                ),
                io.LossMap.Output(
                    display_name="loss_map", tooltip="Distance to the teacher at each measure, for Plot Loss Graph."
                ),
                io.Image.Output(
                    display_name="preview",
                    tooltip="The last preview: teacher above student, the same noise; of nct: controls, without, with; "
                    "of sun: without, as the negative asks, with.",
                ),
                FileName.Output(
                    display_name="file",
                    tooltip="The result's name, for the list of files in any loader: LoRA loaders, Apply Guidance "
                    "Adapter, Apply Negative Adapter, Load Control Adapter, initial_lora.",
                ),
                RecipeSocket.Output(display_name="recipe", tooltip="How to sample it, for One-Step Sample."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **unused: Any) -> float:
        """Every queue runs: what is already there is 'existing's business."""
        return float("nan")

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        prompts: str,
        name: str,
        existing: str,
        settings: Any = None,
        **widgets: Any,
    ) -> io.NodeOutput:
        name, texts = checked_name(name), check_prompts(lines(prompts))
        chosen = settings_of(settings or {}, **widgets)
        with running(name) as finish, adapted(model, clip, vae, targets=chosen.targets) as host:
            report = Reporter(cls.hidden.unique_id, name, finish)
            result = distil(host, texts, chosen, run_folder(name), existing=existing, report=report)
        return outputs(result, publish(result.path, name))


def settings_of(
    finer: dict[str, Any], method: str, preset: str, steps: int, initial_lora: str, **shown: Any
) -> Settings:
    """The preset, then the finer settings, then what the node shows."""
    changes = {**finer, **shown, "student_steps": int(shown["student_steps"]), "negative": shown["negative"].strip()}
    chosen_method = PRESETS[preset]["method"] if method == BY_PRESET else method
    if steps:
        changes["steps"] = steps
    if initial_lora != NO_LORA:
        changes["initial_lora"] = folder_paths.get_full_path_or_raise("loras", initial_lora)
    known = {entry.name for entry in (*described(Settings), *described(METHODS[chosen_method].settings))}
    return of_preset(preset, **{"method": chosen_method, **{n: v for n, v in changes.items() if n in known}})


def outputs(result: Result, file: str) -> io.NodeOutput:
    told = read_told(result.path)
    words = f"{file} is an adapter: load it with {LOADERS.get(told['kind'], 'its own node')}" if told else ""
    said = [f"{file} ({result.updates} updates, {result.seconds:.0f} s, {result.role})", result.check, *result.notes]
    shown = {"text": ["\n".join([*said, *filter(None, [words])])], "onestep_preview": [viewed(result.preview)]}
    # who asks for a LoRA where there is none is stopped with a word, and the other nodes go on
    lora = ExecutionBlocker(f"{words}, by the output file") if told else read_tensors(result.path)
    return io.NodeOutput(lora, loss_map(result.metrics), as_image(result.preview), file, result.recipe, ui=shown)


NODES = [DistilOneStepLoRA]
