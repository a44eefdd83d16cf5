"""The product's promise, measured: distil a model with a preset, then stand the student beside its teacher and the
real pictures.

    python benchmarks/quality.py --model tiny --preset Balanced --minutes 90 --prompts FILE --reference FILE.npz \\
        --samples 3000 --seeds 0 1 2 --runs runs/quality --out benchmarks/results/quality-tiny.md

Each seed is a run of its own and an evaluation of its own. The run ends with its schedule, or after --minutes. The
table
gives the mean over seeds and the worst of them; the curve is the watch's, from metrics.jsonl.
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
from onestep.cli.model import at_native_size, native_size, open_host, read_prompts
from onestep.training.distil import Progress, distil
from onestep.training.evaluation import evaluate
from onestep.training.settings import Settings, preset

BETTER_LOW = ("fd_real", "fd", "sliced_real", "sliced")


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


def measure(args: argparse.Namespace, host: Any, path: Path, prompts: list[str], settings: Settings, seed: int) -> Any:
    """The evaluation's table of one seed."""
    reference = None if args.reference is None else read_pictures(args.reference)
    student = student_of(read_lora(str(path), host), host, "student")
    judge = judge_of(args.model, args.judge)
    table, _ = evaluate(
        host,
        [student],
        prompts,
        args.samples,
        reference,
        judge,
        seed,
        size=native_size(host),
        guidance=settings.guidance,
    )
    return table


def rows_of(table: Any) -> dict[str, dict[str, float]]:
    return {row.name: {name: found.value for name, found in row.measures.items()} for row in table.rows}


def summary(tables: list[Any]) -> list[str]:
    """Mean and worst of each measure over the seeds, a line a row."""
    every = [rows_of(table) for table in tables]
    names = list(every[0])
    measures = list(dict.fromkeys(key for row in every[0].values() for key in row))
    lines = ["| row | " + " | ".join(measures) + " |", "|---|" + "---|" * len(measures)]
    for name in names:
        cells = []
        for key in measures:
            values = [rows[name][key] for rows in every if key in rows[name]]
            worst = max(values, default=0.0) if key in BETTER_LOW else min(values, default=0.0)
            cells.append(f"{statistics.mean(values):.3f} ({worst:.3f})" if values else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


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
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    prompts = read_prompts(args.prompts)
    changes = dict(text.split("=", 1) for text in args.set)
    settings = preset(args.preset).with_texts(changes)
    tables, curves, seconds = [], [], []
    for seed in args.seeds:
        chosen = replace(settings, seed=seed)
        host, result, lines = train(args, chosen, prompts, args.runs / f"{args.model}-{seed}".replace("/", "_"))
        began = time.monotonic()
        tables.append(measure(args, host, result.path, prompts, chosen, seed))
        curves.append(lines)
        seconds.append(result.seconds)
        print(tables[-1].to_text(), f"\nscored in {time.monotonic() - began:.0f} s", flush=True)
    told = [
        f"`{args.model}`, preset {args.preset} with {json.dumps(changes)}, {args.samples} samples, seeds {args.seeds}: "
        f"mean (worst). Training took {max(seconds) / 60:.0f} minutes at most, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {platform.machine()}.",
        "",
        *summary(tables),
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
