"""A short run of `onestep.distill` on a tiny model's folder, which may be killed on the way.

distil_runner.py MODEL OUT UPDATE THREADS SIZES    ->    SIGKILL, to itself, once UPDATE is over
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from onestep.pipelines.distill import distill
from onestep.pipelines.load import load

RUN = {"student_steps": 4, "warm_start": 1, "critic_warm_up": 1, "critic_updates": 1, "pairs": 2, "batch": 2}
RUN |= {"steps": 4, "rank": 2, "teacher_steps": 2, "watch_samples": 4, "preview_every": 0}
RUN |= {"save_every": 1, "ema": 0.5, "learning_rate": 0.01}


def ran(model: Path, out: Path, sizes: str = "32x32", **more: Any) -> Any:
    told = {**RUN, "sizes": sizes, "existing": "continue", **more}
    return distill(load(model), ["a red dragon", "a wall"], "dmd", out=out, **told)


if __name__ == "__main__":
    model, out, update, threads, sizes = sys.argv[1:]
    torch.set_num_threads(int(threads))

    def report(progress: Any) -> bool:
        if progress.update >= int(update) and progress.numbers:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    ran(Path(model), Path(out), sizes=sizes, report=report)
