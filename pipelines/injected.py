"""LoRAs on a pipeline: by its own loader in diffusers or, where its class has none, by peft itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor

PREFIX = "transformer."


def load_weights(pipe: Any, network: Any, tensors: Mapping[str, Tensor], name: str) -> None:
    """Put ``tensors``, under diffusers' keys, on ``network`` as the adapter ``name``; pipe: whose it is, or its twin's.
    Of the classes that are served PixArtSigmaPipeline alone has no loader."""
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(dict(tensors), adapter_name=name)
        return
    own = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    rank = len(next(value for key, value in own.items() if ".lora_A." in key))
    layers = sorted({key.rpartition(".lora_")[0] for key in own})
    # alpha is the rank, as in every file without one
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)
    inject_adapter_in_model(config, network, adapter_name=name)
    set_peft_model_state_dict(network, own, adapter_name=name)
    for path, weight in network.named_parameters():
        if f".{name}." in path:
            weight.requires_grad_(False)


def take_off(pipe: Any, network: Any, name: str) -> None:
    """Drop the adapter ``name`` from wherever it is on."""
    if hasattr(pipe, "delete_adapters"):
        pipe.delete_adapters(name)
        return
    for layer in network.modules():
        if name in getattr(layer, "lora_A", {}):
            layer.delete_adapter(name)


def take_all_off(pipe: Any, network: Any) -> None:
    """Drop every adapter."""
    if hasattr(pipe, "unload_lora_weights"):
        pipe.unload_lora_weights()
        return
    names = {name for layer in network.modules() for name in getattr(layer, "lora_A", {})}
    for name in sorted(names):
        take_off(pipe, network, name)
