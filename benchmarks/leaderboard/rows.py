"""One row of the board: a method, trained with the board's forwards and measured."""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from budget import costs, settled
from worlds import World, world_of

from onestep.core.router import router_file
from onestep.training.distil import distil
from onestep.training.methods import METHODS, settings_for
from onestep.training.settings import Settings, described

NOT_HERE = {
    "guidance-lora": "takes as many steps as its teacher",
    "lora-guided": "takes as many steps as its teacher",
    "tune": "keeps the steps of a model that has few",
    "pso": "prefers pictures of a student that is there",
    "sfd": "teaches a concept away",
    "di-star": "needs rewards of pictures",
    "distillation-dpo": "needs rewards of pictures",
}
"""LoRA methods that are no few-step distillation."""
SEVERAL = ("cdm", "tdm", "phased-dmd", "perflow", "pcm", "mlcm", "tscd", "tcd")
"""Made for several steps; the others are tried in one as well."""
ONE = ("boot",)
"""Made for one step."""


def methods_in(steps: int) -> list[str]:
    """Those that have a row for as many steps of the student."""
    names = [name for name, method in METHODS.items() if method.makes == "LoRA" and name not in NOT_HERE]
    return [name for name in names if name not in (SEVERAL if steps == 1 else ONE)]


def ranked(rows: list[dict[str, Any]], rank: Callable[[dict[str, Any]], float]) -> list[str]:
    """The methods of rows of one number of steps, the best mean first; those that failed are left out."""
    failed = {found["method"] for found in rows if "failed" in found}
    names = {found["method"] for found in rows} - failed
    means = {name: statistics.mean(rank(found) for found in rows if found["method"] == name) for name in names}
    return sorted(means, key=lambda name: means[name])


def settings_of(method: str, steps: int, seed: int, world: World, batch: int) -> Settings:
    """What the world tells every method, of which those settings are taken that it has."""
    shared, own = ({entry.name for entry in described(one)} for one in (Settings, METHODS[method].settings))
    run: dict[str, Any] = {"batch": batch, "watch_every": 0, "preview_every": 0, "candidate_every": 0}
    run |= {"checkpointing": False, "student_steps": steps, "seed": seed, "start": 1.0, "ema": 0.99}
    known = {name: value for name, value in world.told().items() if name in shared | own}
    return settings_for(method, **run, **known)


def row(method: str, steps: int, seed: int, args: Any) -> dict[str, Any]:
    """Trains and measures it. A method that fails has its reason."""
    begun, world = time.monotonic(), world_of(args)
    batch, forwards = args.batch or world.batch, args.forwards or world.forwards
    told: dict[str, Any] = {"method": method, "steps": steps, "seed": seed}
    try:
        settings = settings_of(method, steps, seed, world, batch)
        with costs(world.host(), world.prompts, settings) as cost:
            settings = settled(settings, forwards, cost)
            told["forwards"] = round(cost(settings))
        folder = args.runs / f"{method}-{steps}-{seed}"
        share_pairs(folder, args.runs / f"pairs-{seed}")
        result = distil(world.host(), world.prompts, settings, folder, existing="continue")
        told |= {"updates": result.updates, "seconds": round(time.monotonic() - begun, 1)}
        told |= {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        router = router_file(result.path)
        found = world.scores(router if router.is_file() else result.path, result.recipe)
    except Exception as error:  # a method that fails is a row as well
        return told | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    return told | {key: round(value, 4) for key, value in found.items()}


def share_pairs(folder: Path, shared: Path) -> None:
    """The runs of a seed draw their pairs from one folder: a pair is a function of the seed and its place alone, and is
    made once, though each run is charged for its own."""
    shared.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    if not (folder / "pairs").exists():
        (folder / "pairs").symlink_to(shared.resolve(), target_is_directory=True)


def one(job: tuple[str, int, int], args: Any) -> None:
    """In a process of its own: its peak of memory is the row's."""
    torch.set_num_threads(1)
    found = row(*job, args)
    print(json.dumps(found), flush=True)
    with (args.runs / "rows.jsonl").open("a") as file:
        file.write(json.dumps(found) + "\n")


def known(path: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
