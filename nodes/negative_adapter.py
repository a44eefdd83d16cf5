"""`Apply Negative Adapter`: a trained negative prompt, in one forward, at CFG 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..core.adapter_file import load_adapter
from ..core.adapter_module import Call
from ..core.cond import Cond
from ..core.errors import OneStepError
from ..core.families import FAMILIES, detect
from ..core.negative_adapter import MAKERS, MOST, NegativeAttention, check_base, checked_scale
from ..core.role_map import RoleMap
from .adapter_hooks import AdapterHooks, targets_of
from .applied_adapter import AppliesAdapter, adapter_input, base_input, dial_input
from .places import ADAPTERS, named_places, path_of
from .steer import check_negative

KEY = "onestep_negative_adapter"
ROLE = "away"


class ApplyNegativeAdapter(AppliesAdapter):
    """A MODEL that a trained adapter keeps away from a negative text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepApplyNegativeAdapter",
            display_name="Apply Negative Adapter",
            category="OneStep/guidance",
            description="Gives a few-step model its negative prompt back, as an adapter has learnt it: at CFG 1, in "
            "one forward a step. The adapter is trained by Train Adapter, method sun, for any checkpoint of "
            "the same base; Negative Steering needs no training.",
            search_aliases=["sun", "speedupnet", "negative prompt", "cfg free"],
            inputs=[
                base_input(),
                io.Conditioning.Input("negative", tooltip="What to keep away from, by the model's own text encoder."),
                adapter_input("a negative adapter"),
                dial_input(
                    "scale", 1.0, 0.0, MOST, 0.05, "How hard to push: 1 as it was trained, 0 = off. Sample at cfg 1."
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model under the negative: sample it at cfg 1.")],
        )

    @classmethod
    def execute(cls, model: Any, negative: Any, adapter: str, scale: float) -> io.NodeOutput:
        with named_places():
            return io.NodeOutput(model_away(model, negative, path_of(adapter, ADAPTERS), scale))


def model_away(model: Any, negative: Any, path: Path, scale: float) -> Any:
    """A clone of MODEL under the adapter of ``path`` and a negative CONDITIONING; ``model`` stays as it is.

    Raises OneStepError for a model that can have none, for another base's adapter, and for a negative or a scale that
    does not fit.
    """
    scale, family = checked_scale(scale), detect(model.model.diffusion_model)
    if not FAMILIES[family].unet:
        raise OneStepError(
            f"a negative adapter acts on a U-Net's cross-attentions, which this {family!r} model has not: use Negative "
            "Steering"
        )
    module = load_adapter(path, MAKERS, family).module.requires_grad_(False)
    check_base(module, {target.name: target for target in targets_of(model.model, family)}, family)
    check_negative(negative, module.config.text, False)
    _check_range(negative)
    if any(KEY in wrappers for wrappers in model.wrappers.values()):
        raise OneStepError(
            "this MODEL has a negative adapter already: give both negatives to one, through Conditioning (Combine), or "
            "plug in the MODEL from before the first"
        )
    clone = model.clone()
    if scale:
        ours = Away(module, family, [text for text, _ in negative], scale)
        ours.hooks.put_on(clone, KEY, ours.apply_model)
    return clone


def _check_range(negative: Any) -> None:
    for _, told in negative:
        first, last = told.get("start_percent", 0.0), told.get("end_percent", 1.0)
        if (first, last) != (0.0, 1.0):
            raise OneStepError(
                f"the negative acts from {first:g} to {last:g} of the schedule, which the adapter cannot honour: plug "
                "in the condition without a timestep range, or use Negative Steering"
            )


class Away:
    """An adapter on one patched MODEL: what each forward tells it.

    texts: [n, L, C] each, whose tokens are taken together.
    """

    def __init__(self, module: NegativeAttention, family: str, texts: list[Tensor], scale: float) -> None:
        self.hooks, self.scale = AdapterHooks(module, family, ROLE), scale
        most = max(map(len, texts))
        self.text = torch.cat([comfy.utils.repeat_to_batch_size(text, most) for text in texts], 1)

    def apply_model(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """ComfyUI's APPLY_MODEL. With CFG on, its negative rows stay as they are."""
        roles = self.hooks.roles(executor.class_obj, x)
        # time and condition are told to adapter modules that ask for them; this one does not
        nothing: Any = None
        told = self._told(x, args[3] if len(args) > 3 else kwargs.get("transformer_options"))
        with roles.serving(RoleMap(((ROLE, None),), call=Call(nothing, nothing, told))):
            return executor(x, t, *args, **kwargs)

    def _told(self, x: Tensor, options: dict[str, Any] | None) -> dict[str, Any]:
        """Each prompt of a batch has its own negative, where there are several: in turn, as ComfyUI spreads them."""
        flags = (options or {}).get("cond_or_uncond") or [0]
        each = len(x) // len(flags)
        text = torch.cat([comfy.utils.repeat_to_batch_size(self.text, each)] * len(flags)).to(x.device)
        scales = torch.tensor([0.0 if flag else self.scale for flag in flags]).repeat_interleave(each)
        return {"negative": Cond(text), "scale": scales}


NODES = [ApplyNegativeAdapter]
