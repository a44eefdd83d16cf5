"""One process of a small run, as torchrun starts it: RANK, WORLD_SIZE and where they meet are in the environment.

    process_runner.py FOLDER METHOD STEPS [KILL_RANK AFTER [BATCH ACCUMULATION]]

The process KILL_RANK dies as the kernel would kill it once it has seen AFTER updates.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from kill_runner import _load


def settings_of(method: str, steps: int, batch: int, accumulation: int) -> Any:
    from small_host import small

    quiet = {"watch_every": 2, "preview_every": 0, "warm_up": 1, "batch": batch, "pairs": 2 * batch}
    quiet |= {"save_every": 1, "accumulation": accumulation}
    if method == "dmd":
        return small(warm_start=2, critic_warm_up=1, steps=steps, critic_updates=1, **quiet)
    return small(method=method, steps=steps, **quiet)


def main(
    folder: str, method: str, steps: str, dying: str = "-1", after: str = "0", batch: str = "4", parts: str = "1"
) -> None:
    _load()
    import torch
    from small_host import SmallHost
    from whole_runs import run

    from onestep.training.engine import processes
    from onestep.training.engine.trainer import Trainer

    torch.set_num_threads(1)
    step = Trainer.step

    def stepped(trainer: Any, update: int) -> Any:
        if processes.rank() == int(dying) and update == int(after):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer, update)

    Trainer.step = stepped  # type: ignore[method-assign]
    torch.manual_seed(0)
    with processes.joined():
        run(
            Path(folder), settings_of(method, int(steps), int(batch), int(parts)), host=SmallHost(), existing="continue"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
