"""A control's features where a picture's tokens enter a transformer of ComfyUI's."""

from __future__ import annotations

from typing import Any

import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor, nn
from torch.nn.functional import pad

KEY = "onestep_control"


def _with(added: Tensor, picture: Tensor) -> Tensor:
    """``picture``, [B, M, C] or [B, ..., C], and ``added`` [B, N, C] on its first N tokens. What follows are the tokens
    of reference pictures."""
    tokens = picture.flatten(1, -2)
    return (tokens + pad(added.to(picture), (0, 0, 0, tokens.shape[1] - added.shape[1]))).view_as(picture)


def entering(added: Tensor, before: Any) -> Any:
    """A replacement of SD3's or Flux's first block that gets ``added`` [B, N, C] besides the picture's first N tokens.

    before: the replacement that was there, which goes on with the block, or None.
    """

    def replace(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        args = {**args, "img": _with(added, args["img"])}
        return extra["original_block"](args) if before is None else before(args, extra)

    return replace


def behind_entry(entry: nn.Module, added: Tensor, options: dict[str, Any]) -> None:
    """Within the call of these transformer_options, ``added`` [B, N, C] is added to what the layer ``entry`` gives.

    The forward runs uncompiled: torch does not guard hooks.
    """

    def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
        axis = 1 if hasattr(entry, "out_channels") else -1
        handle = entry.register_forward_hook(
            lambda module, given, out: _with(added, out.movedim(axis, -1)).movedim(-1, axis)
        )
        try:
            with torch.compiler.set_stance("force_eager"):
                return executor(*args, **kwargs)
        finally:
            handle.remove()

    add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, apply_model, options)
