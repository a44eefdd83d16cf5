"""`Load One-Step LoRA`: a few-step LoRA merged into a MODEL, with the recipe to sample it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_sampling as sampling
import folder_paths
from comfy.weight_adapter.lora import LoRAAdapter
from comfy_api.latest import io, ui

from ..core.adapter_file import refuse_adapter
from ..core.errors import OneStepError
from ..core.families import bind_comfy, detect
from ..core.ksampler import core_nodes
from ..core.licences import license_line, sources_in
from ..core.lora_file import State, fit, load_lora
from ..core.recipe import PRESETS, Recipe, step_files
from ..core.recipe.by_name import LORA, MODEL
from ..core.recipe.presets import preset_names
from ..core.recipe.recognised import of_second_order, recognised
from ..core.schedule import NoiseSchedule
from ..core.targets import Target
from ..core.tensor_file import read_header
from .denoiser import ScaledTime, schedule_of
from .origin import file_of
from .places import LORAS, stamp
from .step_loras import with_step_loras

RecipeSocket = io.Custom("ONESTEP_RECIPE")
FROM_FILE = "from the file"
NO_LORA = "none (the model is few-step itself)"
PREDICTIONS = {"sample": sampling.X0, "epsilon": sampling.EPS, "v_prediction": sampling.V_PREDICTION}


class LoadOneStepLoRA(io.ComfyNode):  # type: ignore[misc]
    """Merge a LoRA made by OneStep, or one of the public few-step LoRAs, and say how to sample it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepLoadLoRA",
            display_name="Load One-Step LoRA",
            category="OneStep/loaders",
            description="Merges a few-step LoRA into the model and reads its recipe: the steps, the levels and "
            "the noise it was made for.",
            search_aliases=["one step", "turbo", "lightning", "hyper", "dmd2", "lcm", "few step"],
            has_intermediate_output=True,
            inputs=[
                io.Model.Input("model", tooltip="The base that the LoRA was made for."),
                io.Combo.Input(
                    "lora_name",
                    options=[NO_LORA, *folder_paths.get_filename_list("loras")],
                    tooltip="A file in models/loras. 'none' takes the model as it is, for merged checkpoints "
                    "such as SD-Turbo.",
                ),
                io.Combo.Input(
                    "recipe",
                    options=[FROM_FILE, *PRESETS],
                    default=FROM_FILE,
                    tooltip="How to sample it. Files made by OneStep say so themselves, public ones are known by their "
                    "names; for others choose the preset of their kind.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the LoRA merged at the recipe's strength."),
                RecipeSocket.Output(
                    display_name="recipe", tooltip="For One-Step Sample, One-Step Sampler and One-Step Sigmas."
                ),
                io.String.Output(
                    display_name="how to sample",
                    tooltip="With which of ComfyUI's own nodes and values the same picture is drawn, or why with none.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: Any = "", **unused: Any) -> Any:
        return stamp(lora_name, LORAS)

    @classmethod
    def execute(cls, model: Any, lora_name: str, recipe: str) -> io.NodeOutput:
        path = None if lora_name == NO_LORA else Path(folder_paths.get_full_path_or_raise("loras", lora_name))
        if path:
            refuse_adapter(path, read_header(path).metadata)
        family = detect(model.model.diffusion_model)
        found, taken = recipe_of(path or file_of(model), family, recipe, LORA if path else MODEL)
        if found.family != family:
            raise OneStepError(
                f"the recipe is for {found.family!r} models, this MODEL is {family!r}: choose the base it was made for"
            )
        paths = step_files(path, found) if path else []
        if len(paths) > 1:
            patched, left_out = with_step_loras(model, paths, family, found)
        else:
            patched, left_out = merged(model, path, family, found.lora_scale) if path else (model.clone(), "")
        patched = with_prediction(patched, found)
        said = taken + how_to_sample(found, schedule_of(patched.get_model_object("model_sampling")))
        more = ", ".join(each.name for each in paths[1:])
        said += f"\nEach step has a LoRA of its own, {more} too: this MODEL takes each at its level." if more else ""
        said += f"\nOf {lora_name[-80:]}, {left_out}." if left_out else ""
        licences = license_line(sources_in(read_header(path).metadata)) if path else ""
        said += f"\n{licences[0].upper()}{licences[1:]}." if licences else ""
        return io.NodeOutput(patched, found, said, ui=ui.PreviewText(said))


def recipe_of(path: Path | None, family: str, name: str, what: str) -> tuple[Recipe, str]:
    """The named preset; or what the header of a LoRA's file or a model's says, else what its names stand for, and a
    line that says so."""
    if name != FROM_FILE:
        return PRESETS[name], ""
    metadata = read_header(path).metadata if path and path.suffix == ".safetensors" else {}
    told = metadata.get("onestep.recipe")
    if told is not None and what == LORA:
        return Recipe.from_json(told), ""
    choose = "choose the preset of its kind under 'recipe'"
    found = recognised(path, metadata, family, choose, what=what) if path else None
    if found is None:
        if path and (said := of_second_order(path, metadata)):
            raise OneStepError(said)
        nothing = f"{path.name[:80]} holds no recipe" if path and what == LORA else "a model alone has no recipe"
        raise OneStepError(f"{nothing}: {choose} ({preset_names(family)})")
    return found.recipe, f"It is {found} (another under 'recipe').\n"


def merged(model: Any, path: Path, family: str, strength: float) -> tuple[Any, str]:
    """A clone of ``model`` with every layer of the file as a patch of its own rows, and in words what of the file is
    left out. OneStepError where a layer has no place in this model."""
    targets = bind_comfy(family, model.model.diffusion_model, model.model.model_config.unet_config)
    file = load_lora(path, [target.name for target in targets], family)
    patches = patches_of(model.model, targets, fit(file.state, targets))
    clone = model.clone()
    taken = set(clone.add_patches(patches, strength))
    if len(taken) < len(patches):
        lost = sorted(key if isinstance(key, str) else key[0] for key in patches.keys() - taken)
        raise OneStepError(
            f"{len(lost)} of the {len(patches)} layers in {path.name[:80]} have no weight in this MODEL: "
            f"{', '.join(lost[:3])}. Load it into the base itself, before other nodes change it"
        )
    file.say_left_out(path)
    return clone, file.said


def patches_of(model: Any, targets: Sequence[Target], state: State) -> dict[Any, Any]:
    """What `ModelPatcher.add_patches` takes: B A of each target, exact, for its rows of the host's weight."""
    keys = {module: f"diffusion_model.{name}.weight" for name, module in model.diffusion_model.named_modules()}
    patches: dict[Any, Any] = {}
    for target in targets:
        if target.name in state:
            a, b = state[target.name]
            start, stop = target.row_range
            key = keys[target.module]
            place = key if target.rows is None else (key, (0, start, stop - start))
            # no alpha: it is folded into B
            patches[place] = LoRAAdapter(set(), (target.host_order(b), a, None, None, None, None))
    return patches


def with_prediction(model: Any, recipe: Recipe) -> Any:
    """``model`` read as answering what the recipe says, and given the times that it says, where that is not its own
    habit."""
    if recipe == recipe.of_base:
        return model
    before = model.get_model_object("model_sampling")
    own = next((kind for kind in (sampling.V_PREDICTION, sampling.EPS) if isinstance(before, kind)), sampling.EPS)
    answers: Any = own if recipe.prediction is None else PREDICTIONS[recipe.prediction]
    times: Any = sampling.ModelSamplingDiscrete if recipe.time_scale == 1 else ScaledTime

    class AsTheRecipeSays(times, answers):  # type: ignore[misc]
        time_scale = recipe.time_scale

    patched = AsTheRecipeSays(model.model.model_config)
    patched.set_sigmas(before.sigmas)
    model.add_object_patch("model_sampling", patched)
    return model


def how_to_sample(recipe: Recipe, schedule: NoiseSchedule) -> str:
    """For a person: which of ComfyUI's own nodes draw the same, or why One-Step Sample is needed."""
    # with_prediction has patched the model already
    core = core_nodes(recipe.of_base, schedule)
    sizes = ", ".join(f"{width}x{height}" for width, height in recipe.sizes[:6])
    made_for = f"\nMade for {sizes}." if sizes else ""
    if core.reason:
        return f"Use One-Step Sample (or One-Step Sampler and Sigmas): {core.reason}.{made_for}"
    return f"One-Step Sample; or, with ComfyUI's own nodes, {core}.{made_for}"


NODES = [LoadOneStepLoRA]
