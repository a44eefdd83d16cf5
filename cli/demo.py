"""onestep demo: the bundled tiny model to one step, from nothing, on any machine; then side by side with its teacher.

The prompts are those of the captions the tiny model was trained on. The settings are a preset's, with fewer steps.
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..training.presets import preset
from ..training.runs.files import write_bytes
from ..training.settings import Settings
from .console import Console, RunFailed, duration
from .distill import train
from .evaluate import judge_of, measure
from .lora import read_lora
from .model import at_native_size, open_host, read_prompts
from .pictures import comparison

MODEL, PRESET = "tiny", "Balanced"
# A machine of two cores has minutes, not hours; its memory is no concern at this size.
SMALLER = {"steps": 40, "warm_start": 240, "pairs": 384, "batch": 16, "checkpointing": False}
TEACHER_STEPS = 25
SHOWN = 10
GOAL = 0.5
"""FD-local to the teacher must fall to this share of the untrained one step's."""


def run(args: Namespace, console: Console) -> None:
    with one_thread():
        demo(args, console)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch computes in one thread: as fast at this size, and the same numbers on every machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def demo(args: Namespace, console: Console) -> None:
    """Train, compare, tell."""
    from ..pipelines.bundled import path_of

    began = time.monotonic()
    prompts = read_prompts(str(path_of(MODEL).parent / "prompts.txt"))
    settings = settings_of(args)
    host, judge = open_host(MODEL, settings.targets, "cpu"), judge_of(MODEL, None)
    folder, existing = Path(args.out).expanduser(), "restart" if args.restart else "continue"
    console.note(f"{MODEL} learns to draw in one step, on {len(prompts)} prompts, in {folder}; Ctrl-C pauses it")
    result = train(host, prompts, at_native_size(settings, set(), host), folder, existing, console)
    facts = {"lora": str(result.path), "training seconds": round(result.seconds, 1)} | _compare(
        host, judge, result.path, prompts, args, folder, console
    )
    facts["seconds"] = round(time.monotonic() - began, 1)
    console.result(_told(facts), facts)
    if args.steps is None and facts["share"] > GOAL:
        raise RunFailed(
            f"FD-local fell to {facts['share']:.2f} of the untrained one step's, not to {GOAL}: please report it"
        )


def settings_of(args: Namespace) -> Settings:
    """The demo's: its preset with fewer steps."""
    chosen = preset(PRESET, **SMALLER)
    if args.steps is None:
        return chosen
    few = {"warm_start": args.steps, "critic_warm_up": args.steps}
    # no more pairs than its warm start can look at
    return chosen.with_(steps=args.steps, **few, pairs=min(chosen.pairs, chosen.batch * args.steps))


def _compare(
    host: Any, judge: Any, path: Path, prompts: list[str], args: Namespace, folder: Path, console: Console
) -> dict[str, Any]:
    """comparison.png and the table, in the run's folder and as facts."""
    asked = Namespace(samples=args.samples, seed=0, guidance=None, teacher_steps=TEACHER_STEPS, size=None)
    lora = read_lora(str(path), host)
    table, pictures = measure(host, [lora], prompts, asked, None, judge, console)
    _, untrained, teacher, student = pictures  # all three from the same noise
    rows = {
        f"the model in {TEACHER_STEPS} steps": pictures[teacher],
        "the model in 1 step": pictures[untrained],
        "the model with the LoRA in 1 step": pictures[student],
    }
    picture = folder / "comparison.png"
    comparison(picture, {name: images[:: max(1, len(images) // SHOWN)][:SHOWN] for name, images in rows.items()})
    write_bytes(folder / "table.json", table.to_json().encode())
    write_bytes(folder / "table.txt", (table.to_text() + "\n").encode())
    distances = {row.name: row.measures["fd"].value for row in table.rows if "fd" in row.measures}
    return {
        "picture": str(picture),
        "table": json.loads(table.to_json()),
        "text": table.to_text(),
        "share": distances[student] / distances[untrained],
    }


def _told(facts: dict[str, Any]) -> str:
    return "\n".join(
        [
            facts["text"],
            "",
            f"FD-local to the teacher: {facts['share']:.2f} of the untrained one step's",
            f"picture: {facts['picture']}",
            f"LoRA: {facts['lora']}",
            f"{duration(facts['seconds'])} in all, {duration(facts['training seconds'])} of them training",
        ]
    )
