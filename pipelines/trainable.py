"""States of a loaded pipeline in which it cannot be trained: put right where that loses nothing, else refused."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from ..core.errors import OneStepError
from ..core.families import blocks_of
from ..core.ordinary import make_ordinary
from ..core.stored import PLAIN, in_float8, is_plain, serve
from ..core.targets import Target, is_adaptable, kernel_size
from .kinds import pipeline_for
from .modular import is_modular

PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "text_conditioner")
CACHES = ("cache", "fbc_", "pyramid", "taylor")  # in the names of diffusers' hooks


def prepare(pipe: Any, network: nn.Module) -> None:
    """Make ``pipe`` fit to be trained. Raises OneStepError, before anything is changed, where it cannot be."""
    _refuse_modular(pipe, network)
    _refuse_absent(pipe)
    # diffusers' own casts of layers hang in hooks
    if in_float8(network) and not any(hasattr(layer, "_diffusers_hook") for layer in network.modules()):
        plain = (value.dtype for value in network.parameters() if value.dtype in PLAIN)
        serve(network, blocks_of(network), next(plain, torch.bfloat16))
    _refuse_weights(network)
    _refuse_hooks(network)
    for name in PARTS:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            make_ordinary(module)


def _refuse_modular(pipe: Any, network: nn.Module) -> None:
    own = pipeline_for(network)
    if is_modular(type(pipe)) and not is_modular(getattr(diffusers, own)):
        raise OneStepError(
            f"a {type(pipe).__name__} is put together of blocks, which is not served: load it as a {own}, or give its "
            "parts to one"
        )


def _refuse_absent(pipe: Any) -> None:
    modular = ["t5_tokenizer", "text_conditioner"] if is_modular(type(pipe)) else []
    needed = ["vae", "text_encoder", "tokenizer", *modular, "scheduler"]
    absent = [name for name in needed if getattr(pipe, name, None) is None]
    if absent:
        raise OneStepError(
            f"this {type(pipe).__name__} has no {absent[0]}, which encodes prompts or draws previews: load the whole "
            "pipeline"
        )


def _refuse_weights(network: Any) -> None:
    """The base must lie in memory, and where its weights are not plain numbers its layers must pass a gradient."""
    for name, weight in network.named_parameters():
        if weight.is_meta:
            raise OneStepError(
                f"{name[-100:]} of this {type(network).__name__} is not in memory (a meta tensor): sequential CPU "
                "offload, or a load that was not finished. Call pipe.remove_all_hooks(), or load it again without "
                "offload"
            )
    tried: set[Any] = set()
    for name, layer in network.named_modules():
        weight = getattr(layer, "weight", None)
        if not is_adaptable(layer) or is_plain(weight):
            continue
        kind = (type(layer), type(weight), getattr(weight, "dtype", ""))
        if kind not in tried:
            tried.add(kind)
            _try(name, layer, kind, network)


@torch.inference_mode(False)
def _try(name: str, layer: nn.Module, kind: tuple[type, type, Any], network: Any) -> None:
    """A forward and a backward of one quantised layer."""
    target = Target(name, layer)
    shape = (1, target.in_features, *kernel_size(layer))
    dtype = network.dtype if network.dtype in PLAIN else torch.float32
    try:
        with torch.enable_grad():
            x = torch.ones(shape, dtype=dtype, device=network.device, requires_grad=True)
            layer(x).float().sum().backward()
        why = "no gradient comes through it" if x.grad is None else ""
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
    if why:
        raise OneStepError(
            f"{name[-100:]} of this base is a {kind[0].__name__} of {kind[1].__name__} {kind[2]}, on "
            f"which nothing can be trained ({why}): load the base in bfloat16, float16 or float32"
        )


def _refuse_hooks(network: Any) -> None:
    """Hooks that answer a forward from an earlier one: nothing could be learnt from it."""
    hooks = [name for module in network.modules() for name in _hooks_of(module)]
    caches = [name for name in hooks if any(word in name.lower() for word in CACHES)]
    if caches or getattr(network, "is_cache_enabled", False):
        raise OneStepError(
            f"this {type(network).__name__} answers from earlier steps ({(caches or ['a cache'])[0][:60]}), of which "
            "nothing can be learnt: call its disable_cache(), or load the base again"
        )


def _hooks_of(module: nn.Module) -> list[str]:
    return list(getattr(getattr(module, "_diffusers_hook", None), "hooks", {}))
