"""Every method at equal network forwards, on a mixture in two dimensions whose density and modes are known.

    python benchmarks/leaderboard --runs runs/leaderboard --out benchmarks/results/leaderboard.md

A row is a method with its student's steps and a seed, in a process of its own, kept in rows.jsonl as it ends: the
command goes on where it was stopped. --methods and --steps choose some; --seeds more of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

from rows import every, known, one
from table import page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/leaderboard"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--prediction", default="flow", choices=("flow", "epsilon"))
    parser.add_argument("--forwards", type=int, default=6000, help="of one sample, for a batch")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--samples", type=int, default=5000, help="of each prompt, measured")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    path = args.runs / "rows.jsonl"
    done = {(found["method"], found["steps"], found["seed"]) for found in known(path)}
    spawn = multiprocessing.get_context("spawn")
    for seed in args.seeds:
        for method, steps in every():
            wanted = steps in args.steps and (not args.methods or method in args.methods)
            if wanted and (method, steps, seed) not in done:
                process = spawn.Process(target=one, args=((method, steps, seed), args))
                process.start()
                process.join()
    if args.out:
        page(args, known(path))


if __name__ == "__main__":
    main()
