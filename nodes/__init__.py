"""The ComfyUI host: the only place that imports comfy."""

from __future__ import annotations

import importlib
import logging
from typing import Any

MODULES = (
    *("tiny", "prompts", "distil", "plan", "train_adapter", "extract", "load_lora", "sample", "fast"),
    *(
        "steer",
        "steer_text",
        "guidance_adapter",
        "negative_adapter",
        "control",
        "control_picture",
        "own_control",
        "diversity",
        "doctor",
    ),
)


async def comfy_entrypoint() -> Any:
    """What ComfyUI asks for: all nodes. A module that fails is left out, with its reason in the log."""
    from comfy_api.latest import ComfyExtension

    class OneStepExtension(ComfyExtension):  # type: ignore[misc]
        async def get_node_list(self) -> list[Any]:
            return [node for module in MODULES for node in nodes_of(module)]

    return OneStepExtension()


def nodes_of(module: str) -> list[Any]:
    """The module's nodes whose schema is sound; none, and a line in the log, where it cannot be imported."""
    try:
        found = importlib.import_module(f".{module}", __name__).NODES
        for node in found:
            node.GET_SCHEMA()
        return list(found)
    except Exception as error:  # another library's fault must not take the other nodes down
        logging.warning("OneStep: the nodes of %s are not available: %s: %s", module, type(error).__name__, error)
        return []
