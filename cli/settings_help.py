"""Every setting and preset in words, for the end of `distill --help`. Imports torch as the methods do: when asked."""

from __future__ import annotations

import textwrap
from typing import Any

from ..training.methods import METHODS
from ..training.presets import PRESETS
from ..training.settings import Settings, described


def settings_help() -> str:
    """Every setting with its default, range and help, for the end of `distill --help`."""
    lines = ["settings (--set KEY=VALUE; the preset's values win over these defaults):"]
    lines += _described(Settings)
    owners: dict[Any, list[str]] = {}
    for method in METHODS.values():
        owners.setdefault(method.settings, []).append(method.name)
    for kind, names in owners.items():
        if described(kind):
            lines += ["", f"of {' and '.join(names)} alone:", *_described(kind)]
    return "\n".join([*lines, "", "presets:", *_presets()])


def _presets() -> list[str]:
    """Each preset with what it is made of, and what it changes."""
    lines = []
    for name, made in PRESETS.items():
        lines += textwrap.wrap(f"{name:<15}{made.about}", 110, initial_indent="  ", subsequent_indent=" " * 17)
        for title, values in (("", made.values), ("with initial_lora: ", made.with_donor)):
            changes = title + ", ".join(f"{key}={value}" for key, value in values.items())
            indent = " " * 17
            lines += textwrap.wrap(changes, 110, initial_indent=indent, subsequent_indent=indent) if values else []
    return lines


def _described(kind: Any) -> list[str]:
    """Each setting of a dataclass with its default, range and help."""
    lines = []
    for entry in described(kind):
        meta = entry.metadata
        bounds = "|".join(meta["choices"]) or (f"{meta['low']}..{meta['high']}" if meta["low"] is not None else "")
        about = f"{meta['help']} [{entry.default if entry.default != '' else 'empty'}{'; ' + bounds if bounds else ''}]"
        lines += textwrap.wrap(f"{entry.name:<22}{about}", 110, initial_indent="  ", subsequent_indent=" " * 24)
    return lines
