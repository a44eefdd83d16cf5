"""kill_distill.py FOLDER OUT UPDATE: `onestep.distill` on a diffusers folder, killed by the kernel before that update.

0: it is not killed. A run that is in OUT goes on.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from kill_runner import _load

PROMPTS = ["a red dragon", "a blue wall", "a small green slime on a stone floor"]
SETTINGS = {
    **{"method": "dmd", "steps": 4, "batch": 2, "pairs": 4, "warm_start": 2, "critic_warm_up": 1, "critic_updates": 1},
    **{"rank": 2, "warm_up": 1, "teacher_steps": 2, "watch_every": 2, "watch_samples": 4, "preview_every": 0},
    **{"save_every": 1, "student_steps": 2, "sizes": "32x32"},
}


def main(folder: str, out: str, deadly: int) -> None:
    _load()
    import onestep
    from onestep.pipelines.load import load
    from onestep.training.engine.trainer import Trainer

    step, updates = Trainer.step, iter(range(1, 10**6))

    def killed(*args: object, **named: object) -> object:
        if next(updates) == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args, **named)  # type: ignore[arg-type]

    Trainer.step = killed  # type: ignore[method-assign, assignment]
    onestep.distill(load(Path(folder)), PROMPTS, out=out, device="cpu", existing="continue", **SETTINGS)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
