"""Kept states of short runs of different methods, for benchmarks/measure.py to rank.

    python benchmarks/measure_states.py --model tiny --out runs/measure/tiny

Each run is a demo's, with another method; every --every updates the factors of the student and of its running mean are
kept, with the recipe and the watch's measures beside them. The runs share the teacher's pairs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from onestep.cli.demo import SMALLER
from onestep.cli.model import at_native_size, open_host, read_prompts
from onestep.core.factors import State
from onestep.core.lora_file import save_lora
from onestep.core.tensor_file import read_tensors, write_tensors
from onestep.training.distil import Progress, distil
from onestep.training.presets import preset
from onestep.training.settings import Settings

QUIET = {"preview_every": 0, "watch_every": 25}
BRANCH = {"steps": 24, "warm_start": 0, "critic_warm_up": 16, "warm_up": 0}
RUNS: dict[str, Settings] = {
    "both": preset("Balanced", **SMALLER, **QUIET),
    "guided": preset("Balanced", **(SMALLER | QUIET | BRANCH | {"matching_guidance": 4.0})),
    "unguided": preset("Balanced", **(SMALLER | QUIET | BRANCH | {"matching_guidance": 1.0, "anchor": 0.0})),
    "fast": preset("Balanced", **(SMALLER | QUIET | BRANCH | {"learning_rate": 4e-4, "anchor": 0.0})),
    "regression": preset("Fast", steps=200, learning_rate=3e-4, pairs=512, batch=16, checkpointing=False, **QUIET),
}
"""Methods and settings that fail in different ways: regression is dull, matching alone loses composition, too much
guidance is burnt, none is not what the teacher draws. All but the first go on from the end of its warm start."""
START = "0300-student"
FROM = 100
"""Updates of a run from nothing before states are kept: earlier ones are far from the best."""
ROLES = ("ema", "student")


def write_state(path: Path, state: State) -> None:
    """The factors of a role as a file."""
    factors = {
        f"{name}:{side}": factor for name, pair in state.items() for side, factor in zip("ab", pair, strict=True)
    }
    write_tensors(path, {name: factor.clone() for name, factor in factors.items()})


def read_state(path: Path) -> State:
    """What `write_state` wrote."""
    tensors = read_tensors(path)
    return {name[:-2]: (tensors[name], tensors[f"{name[:-2]}:b"]) for name in tensors if name.endswith(":a")}


def start_of(host: Any, folder: Path) -> Path:
    """The end of the first run's warm start, as a LoRA."""
    path = folder / "start.safetensors"
    if not path.is_file():
        state = read_state(folder / "both" / f"{START}.safetensors")
        save_lora(path, state, host.family, (folder / "recipe.json").read_text())
    return path


def make(
    model: str, name: str, prompts: list[str], folder: Path, every: int, first: int = FROM, **changes: Any
) -> dict[str, Any]:
    """One run's states in ``folder``/NAME; what it was. changes: to its settings."""
    place, pairs = folder / name, folder / "pairs"
    host = open_host(model, device="cpu")
    settings = at_native_size(RUNS[name], set(), host).with_(**changes)
    if name != "both":
        settings = settings.with_(initial_lora=str(start_of(host, folder)))
    if pairs.is_dir() and not (place / "run").exists():
        shutil.copytree(pairs, place / "run" / "pairs")

    def keep(progress: Progress) -> None:
        often = max(1, every // 6) if progress.phase == settings.method == "dmd" else every
        if progress.preparing or progress.phase == "critic" or progress.update % often or progress.update < first:
            return
        for role in ROLES:
            write_state(place / f"{progress.update:04d}-{role}.safetensors", host.denoiser.roles.state(role))
        told = {"run": name, "update": progress.update, "phase": progress.phase, "watch": progress.numbers}
        with (folder / "states.jsonl").open("a") as file:
            file.write(json.dumps(told) + "\n")

    began = time.monotonic()
    place.mkdir(parents=True, exist_ok=True)
    result = distil(host, prompts, settings, place / "run", existing="restart", report=keep)
    (folder / "recipe.json").write_text(result.recipe.to_json())
    if not pairs.is_dir():
        shutil.copytree(place / "run" / "pairs", pairs)
    return {"run": name, "updates": result.updates, "seconds": time.monotonic() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", default="pipelines/tiny/prompts.txt")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/measure/tiny"))
    args = parser.parse_args()
    prompts = read_prompts(args.prompts)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.runs:
        told = make(args.model, name, prompts, args.out, args.every, FROM if name == "both" else 1)
        print(json.dumps(told), flush=True)
        with (args.out / "runs.jsonl").open("a") as file:
            file.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
