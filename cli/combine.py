"""onestep combine: of the students that a run has kept, a weighted sum becomes its result, where that is better."""

from __future__ import annotations

from argparse import Namespace

from ..core.errors import OneStepError
from .choose import end_again
from .console import Console


def run(args: Namespace, console: Console) -> None:
    if args.evaluations < 2:
        raise OneStepError(f"--evaluations is {args.evaluations}: a search measures 2 sums at least, 40 are usual")
    end_again(args, console, {"combine": args.evaluations})
