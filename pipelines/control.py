"""A trained control adapter in diffusers: any loaded pipeline draws under a control picture."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.adapter_file import load_adapter
from ..core.adapter_module import Call
from ..core.compiled import uncompiled
from ..core.cond import Cond
from ..core.control import check_fit, fitted
from ..core.control_copy import MAKERS
from ..core.controls import control_of
from ..core.errors import OneStepError
from ..core.families import FAMILIES, detect
from ..core.role_map import RoleMap
from ..core.roles import Roles
from ..core.targets import Target, is_adaptable
from .adapt import called_network, network_of
from .guidance_adapter import ORDER
from .networks import port_of
from .threads import lock_of, only_here

ROLE = "control"


def load_control(path: str | Path, pipe: Any) -> Any:
    """The control adapter of a file, on ``pipe``'s device. Raises OneStepError where it was made for another base."""
    network = network_of(pipe)
    adapter = load_adapter(Path(path).expanduser(), MAKERS, detect(network)).module
    check_fit(adapter, _targets(adapter, network, base=True))
    return adapter.to(network.device).requires_grad_(False)


@contextmanager
def controlled(pipe: Any, adapter: Any, control: Any, *, strength: float = 1.0) -> Iterator[None]:
    """Within, ``pipe`` (or a pipeline over its network) draws under ``control``, one picture for all or one for each
    picture that a call draws in this thread, in `control_picture`'s form. strength: 0 is none, 1 what was trained."""
    network = network_of(pipe)
    if not 0 <= strength <= 10:
        raise OneStepError(f"the control's strength is {strength!r:.20}: give 0 to 10; 1 is what was trained")
    # under CPU offload the network lies on the CPU and works elsewhere
    device = getattr(pipe, "_execution_device", network.device)
    with lock_of(network):
        layers = [target for target in _targets(adapter, network).values() if is_adaptable(target.module)]
        roles = Roles(layers, port_of(network))
    roles.add_module(ROLE, adapter.to(device))
    told = {"control": control.to(device), "strength": strength}
    nothing: Any = None
    call = Call(nothing, nothing, told)
    serving = RoleMap(((ROLE, None),), call=call)
    eager = uncompiled(called_network(pipe))
    with torch.no_grad(), eager, _noted(network, call), roles.installed(), roles.serving(serving):
        yield


@contextmanager
def _noted(network: Any, call: Call) -> Iterator[None]:
    """Within, ``call`` is about the time and prompts of what the U-Net ``network`` is asked last."""

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        told = dict(zip(ORDER["unet"], args, strict=False)) | kwargs
        x, mask, more = told["sample"], told.get("encoder_attention_mask"), told.get("added_cond_kwargs") or {}
        call.time = torch.as_tensor(told["timestep"], device=x.device).expand(len(x)).float()
        call.cond = Cond(
            told["encoder_hidden_states"],
            mask=None if mask is None else mask.bool(),
            pooled=more.get("text_embeds"),
            size=more.get("time_ids"),
        )

    handle = (
        network.register_forward_pre_hook(only_here(note), with_kwargs=True) if FAMILIES[detect(network)].unet else None
    )
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def control_picture(adapter: Any, images: Any, size: tuple[int, int] | None = None, *, extract: bool = False) -> Tensor:
    """[B, C, H, W] in [0, 1] as ``adapter`` takes it. images: a PIL image, several, or a tensor [B, C or 3, H, W].

    size: (width, height) in pixels to be drawn; a picture of another size is resized, and the log says so. extract:
    the images are pictures, of which the adapter's own control is taken first.
    """
    found = images if isinstance(images, Tensor) else _tensor(images)
    if found.ndim != 4:
        raise OneStepError(f"a control picture is {list(found.shape)}: give [B, C, H, W], or PIL images")
    if size is not None and tuple(found.shape[2:]) != size[::-1]:
        width, height = found.shape[3], found.shape[2]
        logging.warning("OneStep: the control picture is resized from %dx%d to %dx%d", width, height, *size)
        found = fitted(found, size)
    channels = adapter.config.channels
    if extract:
        return control_of(adapter.config.control)(found)
    if channels == 1 and found.shape[1] == 3:
        found = found.mean(1, keepdim=True)
    if found.shape[1] != channels:
        raise OneStepError(
            f"the control picture has {found.shape[1]} channels, this {adapter.config.control[:40]!r} adapter takes "
            f"{channels}: give them, or a picture with extract=True"
        )
    return found.float()


def _tensor(images: Any) -> Tensor:
    """[B, 3, H, W] in [0, 1] of one PIL image or several of one size."""
    listed = list(images) if isinstance(images, Sequence) else [images]
    arrays = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255 for image in listed]
    if len({array.shape for array in arrays}) != 1:
        raise OneStepError(f"{len(arrays)} control pictures of different sizes: give one size, or one picture")
    return torch.stack(arrays)


def _targets(adapter: Any, network: Any, base: bool = False) -> dict[str, Target]:
    """The layers that ``adapter`` acts on, as far as they are there. base: not the LoRA layers that peft hangs around
    them, whose output is what the stream gets."""
    layers = dict(network.named_modules())
    found = {place.name: layers[place.name] for place in adapter.config.places if place.name in layers}
    return {name: Target(name, getattr(layer, "base_layer", layer) if base else layer) for name, layer in found.items()}
