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
from ..core.control import ControlAdapter, check_fit, fitted
from ..core.controls import control_of
from ..core.errors import OneStepError
from ..core.families import detect
from ..core.roles import RoleMap, Roles
from ..core.side import Call
from ..core.targets import Target
from .adapt import network_of

ROLE = "control"


def load_control(path: str | Path, pipe: Any) -> ControlAdapter:
    """The control adapter of a file, on ``pipe``'s device. Raises OneStepError where it was made for another base."""
    network = network_of(pipe)
    adapter = load_adapter(Path(path).expanduser(), {"control": ControlAdapter.from_config}, detect(network)).side
    check_fit(adapter, _targets(adapter, network, base=True))
    return adapter.to(network.device).requires_grad_(False)  # type: ignore[no-any-return]


@contextmanager
def controlled(pipe: Any, adapter: ControlAdapter, control: Any, *, strength: float = 1.0) -> Iterator[None]:
    """Within, ``pipe`` (or a pipeline over its network) draws under ``control``, one picture for all or one for each
    picture that a call draws, in `control_picture`'s form. strength: 0 is none, 1 what was trained."""
    network = network_of(pipe)
    if not 0 <= strength <= 10:
        raise OneStepError(f"the control's strength is {strength!r:.20}: give 0 to 10; 1 is what was trained")
    # under CPU offload the network lies on the CPU and works elsewhere
    device = getattr(pipe, "_execution_device", network.device)
    roles = Roles(list(_targets(adapter, network).values()))
    roles.add_side(ROLE, adapter.to(device))
    told = {"control": control.to(device), "strength": strength}
    # time and condition are told to sides that ask for them; this one does not
    nothing: Any = None
    role_map = RoleMap(((ROLE, None),), call=Call(nothing, nothing, told))
    with torch.no_grad(), roles.installed(), roles.serving(role_map):
        yield


def control_picture(
    adapter: ControlAdapter, images: Any, size: tuple[int, int] | None = None, *, extract: bool = False
) -> Tensor:
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


def _targets(adapter: ControlAdapter, network: Any, base: bool = False) -> dict[str, Target]:
    """The layers that ``adapter`` acts on, as far as they are there. base: not the LoRA layers that peft hangs around
    them, whose output is what the stream gets."""
    layers = dict(network.named_modules())
    found = {place.name: layers[place.name] for place in adapter.config.places if place.name in layers}
    return {name: Target(name, getattr(layer, "base_layer", layer) if base else layer) for name, layer in found.items()}
