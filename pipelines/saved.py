"""Saving a pipeline whose denoiser has LoRAs on it: written as a plain base with them merged in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..core.errors import OneStepError
from .adapt import network_of


@contextmanager
def merged_in_writing(pipe: Any) -> Iterator[None]:
    """Within, the denoiser's state_dict() is that of a plain network which draws the same: what acts of its LoRAs is
    added to the weights, under the base's own names."""
    network = network_of(pipe)
    others = [name for name, part in pipe.components.items() if part is not network and adapted_layers(part)]
    if others:
        raise OneStepError(
            f"{others[0]} has a LoRA on it, which cannot be saved with the pipeline: call plain().fuse_lora() and "
            "unload_lora_weights() first, then it is part of the weights"
        )
    layers = adapted_layers(network)
    if not layers:
        yield
        return
    hook = network.register_state_dict_post_hook(lambda module, state, prefix, _: _merge(layers, state, prefix))
    try:
        yield
    finally:
        hook.remove()
    logging.warning("OneStep: the LoRAs that act were merged into the weights that were saved")


def adapted_layers(part: Any) -> dict[str, Any]:
    """peft's layers with LoRAs in ``part``, by path."""
    named = part.named_modules() if hasattr(part, "named_modules") else ()
    return {path: layer for path, layer in named if hasattr(layer, "get_delta_weight") and hasattr(layer, "base_layer")}


def _merge(layers: dict[str, Any], state: dict[str, Any], prefix: str) -> None:
    for path, layer in layers.items():
        inside = f"{prefix}{path}."
        for key in [key for key in state if key.startswith(inside)]:
            tensor, name = state.pop(key), key.removeprefix(inside)
            if name.startswith("base_layer."):
                own = name.removeprefix("base_layer.")
                state[inside + own] = with_deltas(layer, tensor) if own == "weight" else tensor


def with_deltas(layer: Any, weight: Any) -> Any:
    """weight + sum of scale B A of what acts and is not merged already."""
    acting = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.scaling]
    total = weight.detach().float()
    for name in acting:
        if name not in layer.merged_adapters:
            total = total + layer.get_delta_weight(name).to(total)
    return total.to(weight.dtype)
