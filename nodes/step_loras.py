"""A LoRA for each step on a MODEL: factors beside its weights, chosen by the level of each forward, so that whatever
sampler draws, each step is drawn with its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP
from torch import Tensor

from ..core.errors import OneStepError
from ..core.families import bind_comfy
from ..core.lora_file import LoraFile, State, fit, load_lora
from ..core.recipe import Recipe
from ..core.roles import Roles
from ..core.step_roles import part_of
from .adapter_hooks import fold, targets_of, unfold
from .guidance_adapter import time_of

KEY = "onestep_step_loras"
ROLE = "student"


def with_step_loras(model: Any, paths: Sequence[Path], family: str, recipe: Recipe) -> tuple[Any, str]:
    """A clone of MODEL that draws each step of ``recipe`` with its own file; and in words what of the files is left
    out. OneStepError for files of another base."""
    if any(KEY in wrappers for wrappers in model.wrappers.values()):
        raise OneStepError("this MODEL has a LoRA for each step already: plug in the MODEL from before the first")
    targets = bind_comfy(family, model.model.diffusion_model, model.model.model_config.unet_config)
    files = [load_lora(path, [target.name for target in targets], family) for path in paths]
    files[0].say_left_out(paths[0])
    clone = model.clone()
    ours = StepLoRAs([_scaled(file, recipe.lora_scale) for file in files], recipe.timesteps, family)
    clone.set_injections(KEY, [PatcherInjection(inject=ours.inject, eject=ours.eject)])
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, ours.apply_model)
    return clone, files[0].said


def _scaled(file: LoraFile, strength: float) -> State:
    return {name: (a, strength * b) for name, (a, b) in file.state.items()}


class StepLoRAs:
    """The factors on each network that ComfyUI patches for the MODEL they were put on."""

    def __init__(self, states: Sequence[State], times: Sequence[float], family: str) -> None:
        self.states, self.times, self.family = states, times, family
        self._roles: dict[int, Roles] = {}

    def inject(self, patcher: Any) -> None:
        """Hooks on the network as it is now: a deep copy has layers of its own."""
        targets = targets_of(patcher.model, self.family)
        roles = Roles(targets)
        # factors are tensors like others, whoever calls
        with torch.inference_mode(False):
            for step, state in enumerate(self.states):
                roles.load(part_of(ROLE, step), fit(state, targets), patcher.load_device)
        roles.steps.split(ROLE, self.times)
        roles.install()
        unfold(patcher.model.diffusion_model)
        self._roles[id(patcher.model)] = roles

    def eject(self, patcher: Any) -> None:
        roles = self._roles.pop(id(patcher.model), None)
        if roles is not None:
            roles.remove()
            fold(patcher.model.diffusion_model)

    def apply_model(self, executor: Any, x: Tensor, t: Tensor, *told: Any, **kwargs: Any) -> Tensor:
        """ComfyUI's APPLY_MODEL."""
        roles = self._roles.get(id(executor.class_obj))
        if roles is None:
            raise OneStepError("the LoRAs are not on this MODEL's layers: load the model again, and report it")
        with roles.use(ROLE, train=False), roles.capture(len(x), time_of(executor.class_obj, t)):
            return executor(x, t, *told, **kwargs)
