"""onestep plan: what a run needs of a card before it starts, and how it can be made to fit."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.errors import OneStepError
from .console import Console
from .model import read_settings


def run(args: Namespace, console: Console) -> None:
    from ..training.plan.cards import card_of, found_card
    from ..training.plan.ladder import planned
    from ..training.plan.text import facts, told
    from ..training.runs.config import SECOND_ORDER

    settings, given = read_settings(args)
    card = card_of(args.card) if args.card else found_card()
    shell = shell_of(args.model)
    if "sizes" not in given:
        settings = replace(settings, sizes="{}x{}".format(*shell.native_size))
    settings = replace(without_null(shell, settings, given), second_order=SECOND_ORDER)
    plan = planned(shell.name, shell.shell, settings, card)
    console.result(told(plan), facts(plan))


def shell_of(model: str) -> Any:
    """MODEL without its weights: a layout by its name, a bundled model, a diffusers folder or a single file."""
    from ..pipelines.bundled import MODELS, path_of
    from ..pipelines.shells import LAYOUTS, layout, of_folder, of_single_file

    if model in LAYOUTS:
        return layout(model)
    path = path_of(model) if model in MODELS else Path(model).expanduser()
    if path.is_dir():
        return of_folder(path)
    if path.is_file():
        return of_single_file(path)
    raise OneStepError(
        f"no model {model[:150]!r}: give a layout ({', '.join(LAYOUTS)}), {', '.join(MODELS)}, a diffusers folder "
        "or a .safetensors file of SD1.5, SD2 or SDXL"
    )


def without_null(host: Any, settings: Any, given: set[str]) -> Any:
    """A base that has no null condition is matched without guidance, where none was asked for."""
    own = settings.flat()
    if host.denoiser.guidance == "cfg" or "matching_guidance" not in own or "matching_guidance" in given:
        return settings
    return settings.with_(matching_guidance=1.0)
