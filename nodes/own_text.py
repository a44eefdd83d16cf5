"""The text that a network makes by itself of its encoder's and of token ids beside it, once for each prompt.

ComfyUI makes it at the first of a sampler's steps, and in training anew at each: here it is made where texts are
encoded, and a network is handed what it would have made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import OneStepError
from ..core.families import FAMILIES, detect

OwnText = Callable[[Tensor, dict[str, Any]], Tensor]


@contextmanager
def own_text(model: Any, device: torch.device) -> Iterator[OwnText | None]:
    """Within, what turns a CONDITIONING's text and what is told beside it into the network's text; None where the
    network reads its encoder's as it is. The layers that make it work on ``device`` meanwhile."""
    network = model.diffusion_model
    name = FAMILIES[detect(network)].token_ids
    if not name:
        yield None
        return
    with _on(device, network.get_submodule(FAMILIES[detect(network)].text_adapter)):
        yield partial(made_of, model, device)


def made_of(model: Any, device: torch.device, text: Tensor, told: dict[str, Any]) -> Tensor:
    """[n, L, C] that a model's network reads of a CONDITIONING's text and what is told beside it, on ``device``: its
    own where it makes one."""
    network = model.diffusion_model
    refuse_without_ids(network, told, text.shape[-1])
    name, dtype = FAMILIES[detect(network)].token_ids, model.get_dtype_inference()
    if not name:
        return text.to(device)
    strengths = told[name.replace("ids", "weights")][None, :, None].to(device, dtype)
    return network.preprocess_text_embeds(text.to(device, dtype), told[name][None].to(device), strengths)  # type: ignore[no-any-return]


def refuse_without_ids(network: nn.Module, told: dict[str, Any], width: int) -> None:
    """Raises OneStepError for a CONDITIONING of another model's encoder: with token ids where none are read, or
    without. width: of its text's tokens, which the network reads."""
    known = FAMILIES[detect(network)]
    right = known.encoders.get(width, next(iter(known.encoders.values())))
    names = {family.token_ids: family for family in FAMILIES.values() if family.token_ids}
    if known.token_ids and known.token_ids not in told:
        raise OneStepError(
            f"the text encoder gives no token ids beside its text, from which {known.short} makes its own: load "
            f"{right.name} (in ComfyUI: {right.loader})"
        )
    others = [family for name, family in names.items() if name in told and name != known.token_ids]
    if others:
        (theirs, *_) = others[0].encoders.values()
        raise OneStepError(
            f"the text encoder is {theirs.name}, whose text this model does not read: load {right.name} (in ComfyUI: "
            f"{right.loader})"
        )


@contextmanager
def _on(device: torch.device, part: nn.Module) -> Iterator[None]:
    before = next(part.parameters()).device
    part.to(device)
    try:
        yield
    finally:
        part.to(before)
