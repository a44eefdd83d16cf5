"""Our methods beside their peers, on the same tiny weights and tensors: loss, gradient, and the time of an update.

    python benchmarks/peers --diffusers-examples diffusers/examples --fastgen FastGen --out benchmarks/results/peers.md

The peers' code is read from checkouts and run as it is; what it imports must be installed beside: of diffusers' scripts
torchvision, datasets, webdataset and braceexpand; of FastGen what its requirements.txt says, no card. Either may be
left out. --pairs 0 leaves out the times.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from peers_page import page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers-examples", type=Path, help="the folder examples of a checkout of diffusers")
    parser.add_argument("--fastgen", type=Path, help="a checkout of NVlabs/FastGen")
    parser.add_argument("--checkouts", default="", help="their commits, for the page")
    parser.add_argument("--pairs", type=int, default=10, help="updates of each side that are timed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[Any] = []
    paces: list[Any] = []
    if args.fastgen:
        fastgen(args, rows, paces)
    if args.diffusers_examples:
        import lcm_script
        import peers_speed

        tell(rows, lcm_script.rows(args.diffusers_examples))
        if args.pairs:
            tell(paces, peers_speed.script_pace(args.diffusers_examples, args.pairs))
    if args.out:
        command = "python benchmarks/peers --diffusers-examples DIR --fastgen DIR --out benchmarks/results/peers.md"
        versions = f"{args.checkouts or 'checkouts not named'}; torch {torch.__version__}, diffusers "
        versions += f"{diffusers.__version__}, peft {peft.__version__}, Python {platform.python_version()}, a CPU."
        args.out.write_text(page(command, versions, rows, paces), "utf-8")


def fastgen(args: argparse.Namespace, rows: list[Any], paces: list[Any]) -> None:
    sys.path.append(str(args.fastgen))
    import fastgen_rows
    import peers_speed

    # it tells each step of making a model
    importlib.import_module("loguru").logger.remove()
    tell(rows, fastgen_rows.rows())
    if args.pairs:
        tell(paces, peers_speed.fastgen_paces(args.pairs))


def tell(kept: list[Any], found: Iterable[Any]) -> None:
    for one in found:
        kept.append(one)
        print(one.line(), flush=True)


if __name__ == "__main__":
    main()
