"""Every method at equal network forwards: on a mixture in two dimensions whose density and modes are known, and on a
bundled model by its judge.

    python benchmarks/leaderboard --runs runs/mixture --out benchmarks/results/leaderboard.md
    python benchmarks/leaderboard --runs runs/mixture --best 5 --seeds 1 2 --out benchmarks/results/leaderboard.md
    python benchmarks/leaderboard --world tiny --reference tiles.npz --runs runs/tiny --out runs/tiny/page.md

A row is a method with its student's steps and a seed, in a process of its own, kept in rows.jsonl as it ends: the
command goes on where it was stopped. --methods and --steps choose some; --seeds more of them; --best N takes more seeds
of the best N that are there.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rows import known, methods_in, one, ranked
from table import page
from worlds import world_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/leaderboard"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--world", default="mixture", choices=("mixture", "tiny", "tiny-flow"))
    parser.add_argument("--prediction", default="flow", choices=("flow", "epsilon"), help="of the mixture's model")
    parser.add_argument("--reference", type=Path, help="real pictures for a bundled model, an .npz")
    parser.add_argument("--forwards", type=int, default=0, help="of one sample, for a batch; 0 = the world's")
    parser.add_argument("--batch", type=int, default=0, help="0 = the world's")
    parser.add_argument(
        "--samples", type=int, default=0, help="that are measured, of the mixture for each prompt; 0 = the world's"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--best", type=int, default=0, help="only the best so many of each number of steps")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    path = args.runs / "rows.jsonl"
    for job in list(jobs(args, known(path))):
        process = multiprocessing.get_context("spawn").Process(target=one, args=(job, args))
        process.start()
        process.join()
    if args.out:
        page(args, known(path))


def jobs(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Iterator[tuple[str, int, int]]:
    """(method, steps, seed) of the rows that are asked for and not there."""
    done = {(found["method"], found["steps"], found["seed"]) for found in rows}
    for seed in args.seeds:
        for steps in args.steps:
            best = ranked([found for found in rows if found["steps"] == steps], world_of(args).rank)[: args.best]
            for method in methods_in(steps):
                chosen = method in best if args.best else not args.methods or method in args.methods
                if chosen and (method, steps, seed) not in done:
                    yield method, steps, seed


if __name__ == "__main__":
    main()
