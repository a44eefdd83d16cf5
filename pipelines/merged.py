"""A network's LoRAs inside its weights for a while: no layer of theirs runs; afterwards every weight is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .saved import adapted_layers, with_deltas


def loras_of(network: Any) -> dict[str, int]:
    """Those that are loaded, by name: which object describes each."""
    return {name: id(config) for name, config in (getattr(network, "peft_config", None) or {}).items()}


@contextmanager
def merged(network: Any) -> Iterator[None]:
    """Within, what acts of the network's LoRAs is added to its weights, and the layers that held them are plain ones.

    The weights that change are kept on the CPU meanwhile, so that they come back bit for bit. Where LoRAs have been
    loaded or unloaded meanwhile, the layers are left as they are then.
    """
    loaded = loras_of(network)
    layers = adapted_layers(network)
    parents = {path: network.get_submodule(path.rpartition(".")[0]) for path in layers}
    before = {path: layer.base_layer.weight.detach().to("cpu", copy=True) for path, layer in layers.items()}
    with torch.no_grad():
        for path, layer in layers.items():
            plain = layer.base_layer
            plain.weight.copy_(with_deltas(layer, plain.weight))
            setattr(parents[path], path.rpartition(".")[2], plain)
    try:
        yield
    finally:
        with torch.no_grad():
            for path, layer in layers.items():
                layer.base_layer.weight.copy_(before[path])
                if loras_of(network) == loaded:
                    setattr(parents[path], path.rpartition(".")[2], layer)
