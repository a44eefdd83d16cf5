"""`Apply Guidance Adapter`: guidance as a dial of a trained adapter, in one forward, at CFG 1."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..core.adapter_file import load_adapter
from ..core.cond import Cond
from ..core.errors import OneStepError
from ..core.families import FAMILIES, detect
from ..core.guidance_adapter import MAKERS, check_base
from ..core.schedule import FlowSchedule
from .adapter_hooks import AdapterHooks, targets_of
from .applied_adapter import AppliesAdapter, adapter_input, base_input, dial_input
from .denoiser import schedule_of
from .places import ADAPTERS, named_places, path_of
from .steer_run import PROMPT

KEY = "onestep_guidance_adapter"
ROLE = "guided"
MOST = 30.0


class ApplyGuidanceAdapter(AppliesAdapter):
    """A MODEL that a guidance adapter guides."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepApplyGuidanceAdapter",
            display_name="Apply Guidance Adapter",
            category="OneStep/guidance",
            description="Gives at CFG 1, in one forward a step, what CFG gives in two. The adapter is trained by "
            "Train Adapter, method agd, for any checkpoint of the same base.",
            search_aliases=["agd", "guidance distillation", "cfg free", "cfg scale"],
            inputs=[
                base_input(),
                adapter_input("a guidance adapter"),
                dial_input("guidance", 4.0, 1.0, MOST, 0.1, "The CFG scale to stand in for. 1 = off. Sample at cfg 1."),
            ],
            outputs=[io.Model.Output(tooltip="The guided model: sample it at cfg 1.")],
        )

    @classmethod
    def execute(cls, model: Any, adapter: str, guidance: float) -> io.NodeOutput:
        with named_places():
            return io.NodeOutput(guided_model(model, path_of(adapter, ADAPTERS), guidance))


def guided_model(model: Any, path: Path, guidance: float) -> Any:
    """A clone of MODEL under the adapter of ``path``; ``model`` stays as it is. OneStepError for another base's."""
    if not (math.isfinite(guidance) and 1 <= guidance <= MOST):
        raise OneStepError(f"guidance is {guidance!r:.40}: it must lie in 1 (none) to {MOST:g}; 2 to 8 are usual")
    family = detect(model.model.diffusion_model)
    module = load_adapter(path, MAKERS, family).module.requires_grad_(False)
    check_base(module, {target.name: target for target in targets_of(model.model, family)}, family)
    if any(KEY in wrappers for wrappers in model.wrappers.values()):
        raise OneStepError("this MODEL has a guidance adapter already: plug in the MODEL from before the first")
    clone = model.clone()
    if guidance != 1:
        ours = Guided(module, family, guidance)
        ours.hooks.put_on(clone, KEY, ours.apply_model)
    return clone


class Guided:
    """An adapter on one patched MODEL: what each forward tells it."""

    def __init__(self, module: Any, family: str, guidance: float) -> None:
        self.hooks, self.family, self.guidance = AdapterHooks(module, family, ROLE), family, guidance

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """ComfyUI's APPLY_MODEL. With CFG on, its negative rows stay unguided."""
        model, options = executor.class_obj, transformer_options or {}
        roles = self.hooks.roles(model, x)
        with roles.use(ROLE), roles.capture(len(x), time_of(model, t), self._cond(x, c_crossattn, options, kwargs)):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def _cond(self, x: Tensor, text: Tensor, options: dict[str, Any], kwargs: dict[str, Any]) -> Cond:
        flags = options.get("cond_or_uncond") or [0]
        scales = torch.tensor([1.0 if flag else self.guidance for flag in flags], device=x.device)
        pooled = kwargs.get("y") if FAMILIES[self.family].pooled else None
        text = options.get(PROMPT, text)  # a summary is of the prompt alone
        return Cond(text, pooled=pooled, guidance=scales.repeat_interleave(len(x) // len(flags)))


def time_of(model: Any, sigma: Tensor) -> Tensor:
    """[B] times as the training's network is told them, from ComfyUI's sigma."""
    schedule = schedule_of(model.model_sampling)
    level = sigma.double().cpu()
    level = level if isinstance(schedule, FlowSchedule) else level / (1 + level**2).sqrt()
    return schedule.time_of_sigma(level).to(sigma)


NODES = [ApplyGuidanceAdapter]
