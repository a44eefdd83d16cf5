"""The product's promise, measured: distil a model with a preset, then stand the student beside its teacher and the
real pictures.

    python benchmarks/quality.py --model tiny --preset Balanced --minutes 90 --prompts FILE --reference FILE.npz \\
        --samples 3000 --seeds 0 1 2 --runs runs/quality --out benchmarks/results/quality-tiny.md

Each seed is a run of its own, which ends with its schedule or after --minutes. All students then draw from the same
noises, beside one teacher. The table gives their mean and the worst of them; the curve is the watch's, from
metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from onestep.cli.evaluate import judge_of, read_pictures, student_of
from onestep.cli.lora import read_lora
from onestep.cli.model import at_native_size, open_host, read_prompts
from onestep.training.distil import Progress, distil
from onestep.training.evaluation.evaluate import evaluate
from onestep.training.presets import preset
from onestep.training.settings import Settings

BETTER_LOW = ("fd_real", "fd", "sliced_real", "sliced", "kd_real", "kd")


def train(
    args: argparse.Namespace, settings: Settings, prompts: list[str], folder: Path
) -> tuple[Any, Any, list[dict[str, Any]]]:
    """The host, the result and the watch's lines of one seed's run; goes on with a run that is already there."""
    host = open_host(args.model, settings.targets, "cpu")
    settings = at_native_size(settings, set(), host)

    def report(progress: Progress) -> bool:
        if "distance" in progress.numbers:
            numbers = {name: round(value, 4) for name, value in progress.numbers.items()}
            print(
                progress.update,
                progress.phase,
                f"{progress.seconds:.0f} s, {progress.eta:.0f} to go",
                numbers,
                flush=True,
            )
        return progress.seconds > 60 * args.minutes

    result = distil(host, prompts, settings, folder, existing="continue", report=report)
    return host, result, [line for line in result.metrics if "distance" in line]


def measure(args: argparse.Namespace, host: Any, paths: dict[str, Path], prompts: list[str], settings: Settings) -> Any:
    """The evaluation's table: the teacher's rows, and a row of each student."""
    table, _ = evaluate(
        host,
        [student_of(read_lora(str(path), host), host, name) for name, path in paths.items()],
        prompts,
        args.samples,
        None if args.reference is None else read_pictures(args.reference),
        judge_of(args.model, args.judge),
        args.evaluation_seed,
        size=host.native_size,
        guidance=settings.guidance,
    )
    return table


def summary(table: Any, students: set[str]) -> list[str]:
    """A line a row; the students' is their mean, and the worst of them in brackets."""
    teachers = [row for row in table.rows if row.name not in students]
    learnt = [row for row in table.rows if row.name in students]
    measures = list(dict.fromkeys(key for row in table.rows for key in row.measures))
    lines = ["| row | " + " | ".join(measures) + " |", "|---|" + "---|" * len(measures)]
    for row in teachers:
        cells = [f"{row.measures[key].value:.3f}" if key in row.measures else "" for key in measures]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return [*lines, f"| students, mean (worst) of {len(learnt)} | " + " | ".join(_spread(learnt, measures)) + " |"]


def _spread(rows: list[Any], measures: list[str]) -> list[str]:
    cells = []
    for key in measures:
        values = [row.measures[key].value for row in rows]
        worst = max(values) if key in BETTER_LOW else min(values)
        cells.append(f"{statistics.mean(values):.3f} ({worst:.3f})")
    return cells


def curve(lines: list[dict[str, Any]], most: int = 20) -> list[str]:
    """The watch's measures along the first seed's run."""
    names = ("distance", "content", "variety", "spread")
    kept = lines[:: max(1, len(lines) // most)]
    head = ["| update | phase | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    return head + [
        f"| {line['update']} | {line['phase']} | " + " | ".join(f"{line[name]:.3f}" for name in names) + " |"
        for line in kept
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--judge", help="a judge's folder; a bundled model has its own")
    parser.add_argument("--preset", default="Balanced")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the preset")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--evaluation-seed", type=int, default=0, help="of the noises that every row draws from")
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    prompts = read_prompts(args.prompts)
    changes = dict(text.split("=", 1) for text in args.set)
    settings = preset(args.preset).with_texts(changes)
    paths, curves, seconds = {}, [], []
    for seed in args.seeds:
        folder = args.runs / f"{Path(args.model).name}-{seed}"
        host, result, lines = train(args, replace(settings, seed=seed), prompts, folder)
        paths[f"student, seed {seed}"] = result.path
        curves.append(lines)
        seconds.append(result.seconds)
    began = time.monotonic()
    table = measure(args, host, paths, prompts, settings)
    told = [
        f"`{Path(args.model).name}`, preset {args.preset} with {json.dumps(changes)}, {args.samples} samples, seeds "
        f"{args.seeds}. Training took {max(seconds) / 60:.0f} minutes at most, scoring "
        f"{(time.monotonic() - began) / 60:.0f}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}.",
        "",
        *summary(table, set(paths)),
        "",
        "Each row with its 95% interval:",
        "",
        *("    " + line for line in table.to_text().splitlines()),
        "",
        "The watch along the first run:",
        "",
        *curve(curves[0]),
    ]
    print("\n".join(told))
    if args.out:
        args.out.write_text("\n".join(told) + "\n", "utf-8")


if __name__ == "__main__":
    main()
