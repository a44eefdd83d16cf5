"""What both trainers are made of: their inputs and outputs, what is looked at as they are queued, and the run."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.errors import OneStepError
from ..training.distil import Result, distil
from ..training.engine.prompts import check_prompts, lines
from ..training.methods import METHODS
from ..training.runs.run import CONTINUE, RESTART, STOP
from ..training.settings import Settings, described, size_list
from .adapt import adapted
from .places import LORAS, checked_name, files_of, run_folder, shown
from .progress import Reporter, viewed
from .refusals import refuse_initial
from .requests import running
from .shell import shells_of
from .unquantized import StorageCheck
from .widgets import widget

NO_LORA = "none"
# A name that fits text inputs and the lists of files alike.
FileName = io.Custom("STRING,COMBO")
DIFFUSERS_ALONE = {"compile_blocks"}
"""Settings that are no widgets. ComfyUI's blocks take its transformer_options, which is not tried compiled."""
HIDDEN = [io.Hidden.unique_id, io.Hidden.extra_pnginfo]


def help_of(name: str) -> str:
    """A setting's own help."""
    return next(entry.metadata["help"] for entry in described(Settings) if entry.name == name)


def makers_of(kind: str) -> list[str]:
    """The methods that make a "LoRA" or an "adapter"."""
    return [name for name, method in METHODS.items() if method.makes == kind]


def methods_told(names: list[str]) -> str:
    """The methods, a line each."""
    titles = [f"{name}: {METHODS[name].title}." for name in names]
    return "\n".join(["How the student learns. Each has settings of its own, which appear when it is chosen.", *titles])


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
    ]


def sizes_input() -> Any:
    return io.String.Input("sizes", default="512x512", tooltip=help_of("sizes"))


def name_input(default: str, place: str) -> Any:
    return io.String.Input(
        "name",
        default=default,
        tooltip=f"Of the run and of its result in {place}. Of any script; subfolders by /, as in people/anna.",
    )


def lora_input(advanced: bool | None = None) -> Any:
    options = [NO_LORA, *files_of(LORAS)]
    told = {"default": NO_LORA, "tooltip": help_of("initial_lora"), "optional": True, "advanced": advanced}
    return io.Combo.Input("initial_lora", options=options, **told)


def run_inputs(without: set[str]) -> list[Any]:
    """What every run has beyond the first widgets: neutral, and folded away."""
    existing = io.Combo.Input(
        "existing",
        options=[CONTINUE, RESTART, STOP],
        default=CONTINUE,
        optional=True,
        advanced=True,
        tooltip="Where a run of this name is there: go on from its last state (same settings, but for "
        "steps and pairs), begin anew, or stop with a word.",
    )
    first = {"sizes", "initial_lora", *DIFFUSERS_ALONE} | without
    return [existing, *(widget(entry, advanced=True) for entry in described(Settings) if entry.name not in first)]


def shared_outputs() -> list[Any]:
    return [
        io.Image.Output(
            display_name="preview",
            tooltip="The last preview: teacher above student, the same noise; of nct: controls, without, with; "
            "of sun: without, as the negative asks, with.",
        ),
        io.LossMap.Output(
            display_name="loss_map", tooltip="Distance to the teacher at each measure, for Plot Loss Graph."
        ),
    ]


class TrainerNode(io.ComfyNode):  # type: ignore[misc]
    """What both trainers do when they are queued."""

    @classmethod
    def validate_inputs(
        cls, name: Any = None, sizes: Any = None, prompts: Any = None, *, method: Any = None
    ) -> bool | str:
        """At queue time: what no run could be made of. What comes from another node is None here. method: ComfyUI gives
        it to every function of a node that has such an input, empty here, and not at all where it is none of those on
        offer."""
        if method is None:
            return f"no such method: choose one of {', '.join(METHODS)}"
        checks = ((run_folder, name), (size_list, sizes), (lambda text: check_prompts(lines(text)), prompts))
        try:
            for check, value in checks:
                if isinstance(value, str):
                    check(value)  # type: ignore[operator]
        except OneStepError as error:
            return shown(str(error))
        return True

    @classmethod
    def fingerprint_inputs(cls, **unused: Any) -> float:
        """Every queue runs: what is already there is 'existing's business."""
        return float("nan")

    @classmethod
    def train(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        prompts: str,
        name: str,
        existing: str,
        settings: Settings,
        check: StorageCheck | None = None,
    ) -> Result:
        """The whole run, with its progress in the node. check: looks at the result before the base is gone."""
        name, texts = checked_name(name), check_prompts(lines(prompts))
        # a page sends the graph along, a script does not
        has_panel = bool(cls.hidden.extra_pnginfo)
        refuse_initial(settings, model.model)
        with running(name) as asked, adapted(model, clip, vae, targets=settings.targets) as host:
            report = Reporter(cls.hidden.unique_id, name, asked, has_panel)
            shells = shells_of(model, vae, settings.targets)
            if check is not None:
                check.refuse_other(host, settings)
            result = distil(host, texts, settings, run_folder(name), existing=existing, report=report, shells=shells)
            if check is not None:
                check.look(host, result.path, texts, settings)
            return result


def seen(result: Result, file: str, *more: str) -> dict[str, Any]:
    """What the node shows of a run that has ended."""
    said = [f"{file} ({result.updates} updates, {result.seconds:.0f} s, {result.role})", result.check, *result.notes]
    return {"text": [shown("\n".join([*said, *more]))], "onestep_preview": [viewed(result.preview)]}
