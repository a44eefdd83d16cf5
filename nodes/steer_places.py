"""Where the tokens of several texts lie in ComfyUI's networks that place them: each text as if it were the only one."""

from __future__ import annotations

from typing import Any

import torch


def numbered(call: Any, told: dict[str, Any]) -> dict[str, Any]:
    """FLUX.2's post_input patch: the tokens of each text of a `steer_networks.Call` are numbered."""
    places, lengths = told["txt_ids"].clone(), (call.context.shape[1], *call.parts)
    numbers = [torch.arange(first, first + n) for first, n in zip((0, *call.firsts), lengths, strict=True)]
    places[..., call.network.params.txt_ids_dims] = torch.cat(numbers)[:, None].to(places)
    return {**told, "txt_ids": places}


def behind_picture(call: Any, told: dict[str, Any]) -> dict[str, Any]:
    """Qwen-Image's: they follow the picture's places."""
    places, lengths = told["txt_ids"], (call.context.shape[1], *call.parts)
    return {**told, "txt_ids": torch.cat([places[:, :length] for length in lengths], 1)}
