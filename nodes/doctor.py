"""`OneStep Doctor`: what is installed, what works and what serves here, as text."""

from __future__ import annotations

import importlib.metadata
import platform

import comfy.model_management
import comfyui_version
import torch
from comfy_api.latest import io, ui

from ..kernels.attention import backends
from ..kernels.ops import states

PACKAGES = ("xformers", "triton", "comfy-kitchen", "bitsandbytes")


def report() -> str:
    """A line each: versions, card, attention's back ends, and what serves the ops."""
    device = comfy.model_management.get_torch_device()
    total = comfy.model_management.get_total_memory(device) / 2**30
    lines = [
        f"Python {platform.python_version()} on {platform.system()}",
        f"torch {torch.__version__}",
        *(f"{name} {version(name)}" for name in PACKAGES),
        f"ComfyUI {comfyui_version.__version__}",
        f"computes on {comfy.model_management.get_torch_device_name(device)}, {total:.1f} GiB",
        *(f"attention by {name}: {state}" for name, state in backends(device).items()),
        *(f"{name}: {state}" for name, state in states(device).items()),
    ]
    return "\n".join(lines)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


class OneStepDoctor(io.ComfyNode):  # type: ignore[misc]
    """What a bug report needs, without prompts and paths."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepDoctor",
            display_name="OneStep Doctor",
            category="OneStep/utils",
            description="Says what is installed, what works, and which implementation serves each of the pack's "
            "operations on this machine.",
            search_aliases=["diagnose", "versions", "triton", "xformers"],
            inputs=[],
            outputs=[io.String.Output(display_name="report", tooltip="The same text, a line each; no paths in it.")],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        text = report()
        return io.NodeOutput(text, ui=ui.PreviewText(text))


NODES = [OneStepDoctor]
