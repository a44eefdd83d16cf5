"""onestep choose: of the students that a run has kept, the best becomes its result, by a measure and beside a picture
of all of them."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from ..core.errors import OneStepError
from ..training.methods import settings_for
from ..training.settings import Settings
from .console import Console
from .distill import answer, train
from .model import open_host, read_prompts, run_config

ORIGIN = ("model", "prompts", "initial_lora")
"""What `distill` writes of a run's parts into its config."""


def run(args: Namespace, console: Console) -> None:
    end_again(args, console, {"choose_by": args.by, "combine": 0})


def end_again(args: Namespace, console: Console, changes: dict[str, Any]) -> None:
    """The run's end once more, with other settings, and without an update."""
    from ..training.runs.candidates import kept

    folder = Path(args.run).expanduser()
    config = run_config(folder)
    told = config.get("origin")
    origin = told if isinstance(told, dict) and all(isinstance(text, str) for text in told.values()) else {}
    if not kept(folder):
        raise OneStepError(
            f"{str(folder)[-150:]} keeps no students to choose from: candidate_every was 0 or more than its updates, "
            "or the run watched nothing. Its result is the last one"
        )
    known = {name: getattr(args, name) or origin.get(name, "") for name in ORIGIN[:2]}
    for name, value in known.items():
        if not value:
            raise OneStepError(f"the run does not say which {name} it was made with: give --{name} as it was then")
    settings = settings_of(config["settings"], origin, changes)
    prompts = read_prompts(known["prompts"])
    host = open_host(known["model"], settings.targets, args.device, stored=True, waiting=settings.streaming != "off")
    answer(train(host, prompts, settings, folder, "continue", console, updates=False), console)


def settings_of(there: dict[str, Any], origin: dict[str, str], changes: dict[str, Any]) -> Settings:
    """The run's own, with ``changes``; its initial LoRA where that came from: the run knows it by its content."""
    values = {**there, **changes}
    if values.get("initial_lora"):
        values["initial_lora"] = origin.get("initial_lora", values["initial_lora"])
    return settings_for(**values)
