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
from ..core.families import FAMILIES, detect
from ..core.guidance_adapter import MAKERS, check_base
from ..core.roles import Roles
from .on_network import OnNetwork, network_in, targets_in
from .own_guidance import OwnGuidance, Rows, part
from .threads import lock_of, only_here

ROLE = "guided"
MOST = 30.0
# What a network is handed, by position, up to the time.
ORDER = {
    "unet": ("sample", "timestep", "encoder_hidden_states"),
    "sd3": ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
    "flux": ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
    "flux2": ("hidden_states", "encoder_hidden_states", "timestep"),
    "chroma": ("hidden_states", "encoder_hidden_states", "timestep"),
    "anima": ("hidden_states", "timestep", "encoder_hidden_states"),
    "wan": ("hidden_states", "timestep", "encoder_hidden_states"),
    "qwen_image": ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep"),
    "krea2": ("hidden_states", "encoder_hidden_states", "timestep"),
    "z_image": ("x", "t", "cap_feats"),
    "lumina2": ("hidden_states", "timestep", "encoder_hidden_states"),
    "pixart": ("hidden_states", "encoder_hidden_states", "timestep"),
}


def load_guidance_adapter(
    pipe: Any, file: str | PathLike[str], guidance: float = 4.0, rows: Rows = "all"
) -> GuidanceDial:
    """Hang the adapter of ``file`` on a pipeline's network, or on a network, until `remove`.

    It works beside LoRAs, loaded before or after, and on any checkpoint of the base that it was trained on. rows: which
    of the network's batch are guided; a pipeline with guidance of its own is refused, unless that is told its prompt's
    half ("second half" in diffusers' pipelines, but for Z-Image's; FLUX.2's have none): then both act. Raises
    OneStepError for a file that is no adapter, or one of another base.
    """
    return GuidanceDial(pipe, read_guidance_adapter(pipe, file), guidance, rows)


def read_guidance_adapter(pipe: Any, file: str | PathLike[str]) -> Any:
    """The adapter of ``file``, an adapter module. Raises OneStepError where it is none of ``pipe``'s base."""
    network = network_in(pipe)
    family = detect(network)
    module = load_adapter(file, MAKERS, family).module.requires_grad_(False)
    check_base(module, targets_in(network), family)
    return module


def check_guidance(value: Any) -> float:
    if not (isinstance(value, int | float) and math.isfinite(value) and 1 <= value <= MOST):
        raise OneStepError(f"guidance is {value!r:.40}: it must lie in 1 (none) to {MOST:g}; 2 to 8 are usual")
    return float(value)


class GuidanceDial(OnNetwork):
    """A guidance adapter that hangs on a network. guidance: the scale of classifier-free guidance, 1 (none) to 30."""

    def __init__(self, pipe: Any, module: Any, guidance: float, rows: Rows = "all", this_thread: bool = False) -> None:
        """this_thread: acts in the forwards of this thread alone."""
        network = network_in(pipe)
        self.guidance, self._family, self._module = guidance, detect(network), module
        self._own = OwnGuidance(pipe, rows, self._family)
        own = only_here if this_thread else lambda hook: hook
        with lock_of(network):
            targets = targets_in(network)
            self._roles = Roles([targets[name] for name in sorted(module.before | module.after)])
            self._roles.add_module(ROLE, module)
            self._roles.install()
            # a summary is the prompt's alone, whatever a steered forward's texts are
            self._attach(pipe, network, own, first=True)

    @property
    def guidance(self) -> float:
        return self._guidance

    @guidance.setter
    def guidance(self, value: float) -> None:
        self._guidance = check_guidance(value)

    def _before(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The call that begins is the guided role's, and is about these times and prompts."""
        told = dict(zip(ORDER[self._family], args, strict=False)) | kwargs
        x, text = told[ORDER[self._family][0]], told.get("cap_feats", told.get("encoder_hidden_states"))
        self._own.check(x, text)
        device = x[0].device
        scales = self._scales(len(x), device)
        self._module.to(device)
        with self._roles.use(ROLE):
            call = self._roles.capture(len(x), self._time(told, len(x), device), self._cond(told, text, scales))
        self._begin(call)

    def _time(self, told: dict[str, Any], batch: int, device: torch.device) -> Tensor:
        """[batch] as the training's network is told it."""
        time = torch.as_tensor(told.get("t", told.get("timestep")), device=device).expand(batch)
        return FAMILIES[self._family].time_of(time.float())  # type: ignore[no-any-return]

    def _cond(self, told: dict[str, Any], text: Any, scales: Tensor | None) -> Cond:
        if isinstance(text, list):  # of tokens [L, C]
            return Cond.concat([Cond(tokens[None]) for tokens in text]).with_(guidance=scales)
        # Chroma's lies over the picture's tokens too
        names = ("encoder_attention_mask", "encoder_hidden_states_mask", "attention_mask")
        mask = next((told[name] for name in names if told.get(name) is not None), None)
        mask = None if mask is None else mask[:, : text.shape[1]].bool()
        text = text.flatten(2) if text.ndim == 4 else text  # Krea 2's, whose layers are beside one another in a Cond
        return Cond(text, mask=mask, pooled=told.get("pooled_projections"), guidance=scales)

    def _scales(self, batch: int, device: torch.device) -> Tensor | None:
        """[batch], 1 for rows that are not guided; None, at which the adapter does not even look, where none is."""
        if self.guidance == 1:
            return None
        scales = torch.ones(batch, device=device)
        scales[part(self._own.rows, batch)] = self.guidance
        return scales
