"""What the nodes that put an adapter's file on a MODEL share: their inputs, and when they run again."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .places import ADAPTERS, files_of, stamp


class AppliesAdapter(io.ComfyNode):  # type: ignore[misc]
    """A node that puts an adapter's file on a MODEL: it runs again where the file has changed."""

    @classmethod
    def fingerprint_inputs(cls, adapter: Any = "", **unused: Any) -> Any:
        return stamp(adapter, ADAPTERS)


def base_input() -> Any:
    return io.Model.Input("model", tooltip="A checkpoint of the base that the adapter was trained on.")


def adapter_input(kind: str) -> Any:
    """The choice of a file. kind: with its article, "a guidance adapter"."""
    tooltip = (
        f"{kind.capitalize()} in models/onestep, where Train Adapter puts it; that node's output file can be plugged "
        "in here."
    )
    return io.Combo.Input("adapter", options=files_of(ADAPTERS), tooltip=tooltip)


def dial_input(name: str, default: float, least: float, most: float, step: float, tooltip: str) -> Any:
    """How strongly the adapter acts. Exact: no digit of a typed value is rounded away."""
    return io.Float.Input(name, default=default, min=least, max=most, step=step, round=False, tooltip=tooltip)
