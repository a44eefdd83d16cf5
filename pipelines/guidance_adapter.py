"""A guidance adapter on a diffusers network: guidance as a dial, without a second forward.

dial = load_guidance_adapter(pipe, "adapter.safetensors", guidance=5)
pipe("a lighthouse", guidance_scale=1)          # the pipeline's own guidance is off: the adapter has it
dial.guidance = 3
dial.remove()
"""

from __future__ import annotations

import math
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter_file import load_adapter
from ..core.cond import Cond
from ..core.errors import OneStepError
from ..core.families import detect
from ..core.guidance_adapter import MAKERS, check_base, with_guidance
from ..core.roles import Roles
from ..core.targets import Target, is_linear

ROLE = "guided"
MOST = 30.0
# What a network is handed, by position, up to the time.
ORDER = {
    "unet": ("sample", "timestep", "encoder_hidden_states"),
    "sd3": ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
    "flux": ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
}


def load_guidance_adapter(pipe: Any, file: str | PathLike[str], guidance: float = 4.0) -> GuidanceDial:
    """Hang the adapter of ``file`` on a pipeline's network, or on a network, until `remove`.

    It works beside LoRAs, loaded before or after, and on any checkpoint of the base that it was trained on. Every row
    of a batch is guided: leave the pipeline's own guidance at 1. Raises OneStepError for a file that is no adapter, or
    one of another base.
    """
    network = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if not isinstance(network, nn.Module):
        raise OneStepError(f"a {type(pipe).__name__} has no U-Net or transformer: give a pipeline, or its network")
    family = detect(network)
    side = load_adapter(file, MAKERS, family).side.requires_grad_(False)
    # peft's own layers stand where the base's stood; what they wrap is theirs
    layers = {name: layer for name, layer in network.named_modules() if is_linear(layer) and ".base_layer" not in name}
    targets = {name: Target(name, layer) for name, layer in layers.items()}
    check_base(side, targets, family)
    return GuidanceDial(network, family, side, [targets[name] for name in sorted(side.before | side.after)], guidance)


class GuidanceDial:
    """A guidance adapter that hangs on a network. guidance: the scale of classifier-free guidance, 1 (none) to 30."""

    def __init__(self, network: Any, family: str, side: Any, targets: list[Target], guidance: float) -> None:
        self.guidance, self._family, self._side = guidance, family, side
        self._roles = Roles(targets)
        self._roles.add_side(ROLE, side)
        self._roles.install()
        self._calls: list[Any] = []
        before = network.register_forward_pre_hook(self._before, with_kwargs=True)
        self._handles = [before, network.register_forward_hook(self._after, always_call=True)]

    @property
    def guidance(self) -> float:
        return self._guidance

    @guidance.setter
    def guidance(self, value: float) -> None:
        if not (isinstance(value, int | float) and math.isfinite(value) and 1 <= value <= MOST):
            raise OneStepError(f"guidance is {value!r:.40}: it must lie in 1 (none) to {MOST:g}; 2 to 8 are usual")
        self._guidance = float(value)

    def remove(self) -> None:
        """Take the adapter off: the network is as it was."""
        self._roles.remove()
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> GuidanceDial:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.remove()

    def _before(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The call that begins is the guided role's, and is about these times and prompts."""
        told = dict(zip(ORDER[self._family], args, strict=False)) | kwargs
        x: Tensor = told[ORDER[self._family][0]]
        time = torch.as_tensor(told["timestep"], device=x.device).expand(len(x))
        mask = told.get("encoder_attention_mask")
        cond = Cond(
            told["encoder_hidden_states"],
            mask=None if mask is None else mask.bool(),
            pooled=told.get("pooled_projections"),
        )
        self._side.to(x.device)
        with self._roles.use(ROLE):
            # Flux is told sigma where all others are told 1000 sigma, or an index
            scale = 1000 if self._family == "flux" else 1
            told_cond = with_guidance(cond, self.guidance) if self.guidance != 1 else cond
            call = self._roles.capture(len(x), time.float() * scale, told_cond)
        self._calls.append(call)
        call.__enter__()

    def _after(self, network: nn.Module, args: Any, output: Any) -> None:
        if self._calls:
            self._calls.pop().__exit__(None, None, None)
