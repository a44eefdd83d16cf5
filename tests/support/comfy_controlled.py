"""The ComfyUI half of both_hosts_drawn.check_control: one step's picture without a control, under a new adapter and
under one away from its start, by core's Apply ControlNet."""

import folder_paths
import torch
from comfy_both_hosts import WORK, told
from safetensors.torch import load_file

from nodes import ControlNetApplyAdvanced
from onestep.core.recipe import Recipe
from onestep.nodes.control import LoadControlAdapter
from onestep.nodes.sample import OneStepSample

folder_paths.add_model_folder_path("controlnet", str(WORK))


def under_control(model, positive, name, start):
    """The latents of ``start``'s size under the adapter of a file, or under none."""
    if name:
        net = LoadControlAdapter.execute(f"{name}.safetensors").args[0]
        picture = load_file(WORK / "picture.safetensors")["picture"].movedim(1, -1).expand(-1, -1, -1, 3)
        positive, _ = ControlNetApplyAdvanced().apply_controlnet(positive, positive, net, picture, 1.0, 0.0, 1.0)
    recipe = Recipe.from_json(told["recipe"])
    drawn = OneStepSample.execute(model, positive, {"samples": start}, recipe, 5).args[0]["samples"]
    return model.model.process_latent_in(drawn)


def controlled(model, clip, prompt, start):
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    names = {"control none": "", "control new": "new", "control": "control"}
    found = {key: under_control(model, positive, name, start) for key, name in names.items()}
    return {key: value.squeeze(2) if value.ndim == 5 else value for key, value in found.items()}


def of_a_video(model, clip, prompt):
    """What is said of two latent frames."""
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    try:
        under_control(model, positive, "control", torch.zeros(1, 16, 2, 4, 4))
    except Exception as error:
        return str(error)
