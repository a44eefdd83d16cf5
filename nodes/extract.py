"""`Extract Few-Step LoRA`: what makes one MODEL differ from another, as a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..core.errors import OneStepError
from ..core.extraction import extract, in_all, of_all
from ..core.families import FAMILIES, detect
from ..core.licence_files import sources_of
from ..core.licences import FEW_STEP, license_header, license_line, told_licenses
from ..core.lora_file import save_lora
from ..core.lora_second import save_second, second_file
from ..core.recipe import PRESETS
from ..core.recipe.recognised import without_recipe
from ..core.targets import Target
from ..core.tensor_file import read_tensors
from .adapter_hooks import targets_of
from .check import check_file
from .origin import file_of, made_of
from .places import LORAS, checked_name, named_places, publish
from .trainer import FileName, name_input

NO_RECIPE = "none"


class ExtractFewStepLoRA(io.ComfyNode):  # type: ignore[misc]
    """The difference of two models as a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepExtract",
            display_name="Extract Few-Step LoRA",
            category="OneStep/training",
            description="Writes what makes a few-step checkpoint (a merged Turbo, Lightning or DMD2 model) differ from "
            "its base as a LoRA for the base's fine-tunes, and says how much of the difference it keeps. LoRAs plugged "
            "into either model are part of it.",
            search_aliases=["extract lora", "lora from checkpoint", "model difference", "svd", "turbo lora"],
            is_output_node=True,
            inputs=[
                io.Model.Input("base", tooltip="What the few-step model was made from."),
                io.Model.Input("few_step", tooltip="The few-step checkpoint of that base."),
                io.Int.Input(
                    "rank",
                    default=64,
                    min=1,
                    max=1024,
                    tooltip="The LoRA's: more keeps more of the difference, in a larger file.",
                ),
                name_input("extracted", "models/loras/onestep"),
                io.Combo.Input(
                    "recipe",
                    options=[NO_RECIPE, *PRESETS],
                    default=NO_RECIPE,
                    tooltip="How the few-step model is sampled: goes into the file, so that Load One-Step LoRA knows.",
                ),
                io.String.Input(
                    "licenses",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Licences that the files do not tell, for the header: base=NAME; few_step_model=NAME.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(display_name="lora", tooltip="For Load LoRA Model."),
                FileName.Output(display_name="file", tooltip="Its name, for the list of files in any LoRA loader."),
            ],
        )

    @classmethod
    def validate_inputs(cls, name: Any = None, licenses: Any = None) -> bool | str:
        try:
            if isinstance(name, str):
                checked_name(name)
            if isinstance(licenses, str):
                told_licenses(licenses)
        except OneStepError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, base: Any, few_step: Any, rank: int, name: str, recipe: str, licenses: str = "") -> io.NodeOutput:
        with named_places():
            path = Path(folder_paths.get_temp_directory()) / "onestep-extracted.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            said = extracted(base, few_step, rank, recipe, path, licenses)
            file, tensors = publish(path, name, LORAS), read_tensors(path)
            second = second_file(path, detect(base.model.diffusion_model), "comfyui")
            if second:
                publish(second, f"{name}{second.stem.removeprefix(path.stem)}", LORAS)
                second.unlink()
            path.unlink()
        return io.NodeOutput(tensors, file, ui={"text": ["\n".join([file, *said])]})


def extracted(base: Any, few: Any, rank: int, recipe: str, path: Path, licenses: str = "") -> list[str]:
    """Write the LoRA to ``path``; what there is to say of it."""
    family = detect(base.model.diffusion_model)
    if detect(few.model.diffusion_model) != family:
        raise OneStepError(
            f"the base is a {family!r} model and the few-step one {detect(few.model.diffusion_model)!r}: plug in two "
            "checkpoints of one base"
        )
    if recipe != NO_RECIPE and PRESETS[recipe].family != family:
        raise OneStepError(f"the recipe {recipe} is for {PRESETS[recipe].family!r} models, this is {family!r}")
    kinds = [str(getattr(model.model.model_type, "name", "")) for model in (base, few)]
    if kinds[0] != kinds[1] and (recipe == NO_RECIPE or PRESETS[recipe].prediction is None):
        raise OneStepError(
            f"the base predicts {kinds[0]} and the few-step model {kinds[1]}: plug in two checkpoints of one base and "
            "one prediction type"
        )
    targets, theirs = targets_of(base.model, family), targets_of(few.model, family)
    others = {target.name: target for target in theirs}
    if lacking := [target.name for target in targets if target.name not in others]:
        raise OneStepError(f"the few-step model has no {lacking[0]}: plug in two checkpoints of one base")
    before, after, bar = Weights(base), Weights(few), comfy.utils.ProgressBar(len(targets))

    def other(target: Target) -> Tensor:
        bar.update(1)
        return after(others[target.name])

    state, layers = of_all(extract(targets, before, other, rank))
    text = None if recipe == NO_RECIPE else PRESETS[recipe].to_json()
    whole = in_all(layers)
    parts = [*made_of(base), *((FEW_STEP, name, file) for _, name, file in made_of(few)[:1])]
    sources = sources_of(parts, licenses, FAMILIES[family].license)
    told = {"onestep.extracted": f"a difference of two models, {whole.weights:.4f} of its weights"}
    header = told | license_header(sources)
    save_lora(path, state, family, text, header, "comfyui")
    second = second_file(path, family, "comfyui")
    also = [save_second(path, second, state, family, text, header, "comfyui")] if second else []
    least, kept = min(layers.items(), key=lambda item: item[1].weights)
    silent = [without_recipe(file_of(few), family)] if text is None else []
    return [
        f"keeps {whole.weights:.1%} of the difference of {len(layers)} layers; least of {least}: {kept.weights:.1%}",
        *silent,
        license_line(sources),
        check_file(base.model, targets, family, path),
        *also,
    ]


class Weights:
    """A MODEL's weights with what is patched onto it, whether it is loaded or not, as core's merging nodes see them."""

    def __init__(self, model: Any) -> None:
        self.patches = model.get_key_patches("diffusion_model.")
        self.names = {
            layer: f"diffusion_model.{name}.weight" for name, layer in model.model.diffusion_model.named_modules()
        }
        self.device = comfy.model_management.get_torch_device()

    @torch.no_grad()
    def __call__(self, target: Target) -> Tensor:
        """[out, in, ...] in canonical order, float32, on the computing device."""
        key = self.names[target.module]
        (stored, convert), *patches = self.patches[key]
        weight = comfy.model_management.cast_to_device(stored, self.device, torch.float32, copy=True)
        weight = comfy.lora.calculate_weight(patches, convert(weight, inplace=True), key)
        return target.canonical_order(weight[slice(*target.row_range)])


NODES = [ExtractFewStepLoRA]
