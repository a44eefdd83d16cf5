"""The forward hook of an adapted layer: adds what the roles of the running call add to it.

It runs for each of a network's many hundred layers in each forward, and on a fast card the host's time is what a small
batch waits for. So what holds for a whole call is found at its first layer, and a layer with one target under one role,
which nearly all are, takes the shortest way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.add_lora import OP, add_one
from ..kernels.choice import REFERENCE
from .adapted_layer import AdaptedLayer, Table
from .role_map import RoleMap, Served

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]


def hook(layer: AdaptedLayer, roles: Any) -> Hook:
    """``layer``'s hook, obeying the `Roles`' active map: it writes over the layer's output, or gives a new tensor."""
    active_here, alone = roles.active_here, layer.alone

    def adapt(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        active = active_here()
        served = active.served
        if not served:
            return None if served is not None else roles.unprepared(layer, active, args[0], output)
        x = args[0]
        if alone is not None and len(served) == 1 and served[0].rows is None and layer.is_plain(x, output):
            one = served[0]
            masters = one.factors.get(alone)
            if masters is None:
                return None
            if _by_plain_torch(one, x):
                a, b = (one.tables.get(x.dtype) or _table(one, x, roles))[alone]
                if not torch.is_grad_enabled():
                    layer.add_alone_(a, b, x, output)
                    return None
                if active.train:
                    return add_one(output, x, masters[0], masters[1], a, b)
        return _several(layer, roles, active, served, x, output)

    return adapt


def _several(
    layer: AdaptedLayer, roles: Any, active: RoleMap, served: tuple[Served, ...], x: Tensor, output: Tensor
) -> Tensor | None:
    """What a layer of any kind gives under any roles."""
    batch = active.batch or len(x)
    if not layer.is_conv and len(x) != batch and not len(x) % batch and len(active.blocks) > 1:
        # diffusers' Z-Image embeds the tokens of all samples in one row; to Krea 2's fusion each of them is a sample
        shaped = x.unflatten(0, (batch, -1)), output.unflatten(0, (batch, -1))
        changed = _several(layer, roles, active, served, *shaped)
        return None if changed is None else changed.flatten(0, 1)
    here = [one for one in served if layer.serves(one.factors)]
    if not here:
        return None
    if not (layer.may_be_written(x, output) and (layer.is_conv or _by_plain_torch(here[0], x))):
        return roles.added(layer, active, x, output)
    if len(x) != active.batch:
        active.sizes(len(x))
    for one in here:
        table = one.tables.get(x.dtype) or _table(one, x, roles)
        if one.rows is None:
            layer.add_(table, x, output)
        else:
            layer.add_(table, x[one.rows], output[one.rows])
    return None


def _by_plain_torch(served: Served, x: Tensor) -> bool:
    """Whether no kernel adds a linear layer's products: asked once in a call."""
    found = served.plain.get(x.dtype)
    if found is None:
        found = served.plain[x.dtype] = OP.choice(x.device, x.dtype) == REFERENCE
    return found


def _table(served: Served, x: Tensor, roles: Any) -> Table:
    """A call's factors in x's dtype."""
    table = served.tables[x.dtype] = roles.casts.of(served.factors, x.dtype, x.device)
    return table
