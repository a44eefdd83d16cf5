"""One row of the board: a method, trained with the board's forwards and measured."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mixture
import torch
from budget import cost, settled
from torch import Tensor

from onestep.core.lora_file import load_lora
from onestep.core.roles import Roles
from onestep.core.sampling import sample
from onestep.training.distil import distil
from onestep.training.methods import METHODS, settings_for
from onestep.training.settings import Settings, described

NOT_HERE = {
    "guidance-lora": "takes as many steps as its teacher",
    "lora-guided": "takes as many steps as its teacher",
    "tune": "keeps the steps of a model that has few",
    "pso": "prefers pictures of a student that is there",
    "sfd": "teaches a concept away",
    "di-star": "needs rewards of pictures",
}
"""LoRA methods that are no few-step distillation."""
SEVERAL = ("cdm", "tdm", "phased-dmd", "perflow", "pcm", "mlcm", "tscd", "tcd")
"""Made for several steps; the others are tried in one as well."""
STEPS = (1, 2, 4)
RATE = 1e-3


def every() -> Iterator[tuple[str, int]]:
    """(method, the student's steps) of each row."""
    for name, method in METHODS.items():
        if method.makes == "LoRA" and name not in NOT_HERE:
            yield from ((name, steps) for steps in STEPS if not (name in SEVERAL and steps == 1))


def settings_of(method: str, steps: int, seed: int, batch: int) -> Settings:
    """One rate for every student and twice that for what is trained beside it; no guidance, so that the student should
    end as the mixture itself."""
    own = {entry.name for entry in described(METHODS[method].settings)}
    told: dict[str, Any] = {"critic_learning_rate": 2 * RATE, "head_learning_rate": 2 * RATE, "warm_start_rate": RATE}
    told |= {"matching_guidance": 1.0, "guidance_schedule": "constant", "gan_weight": 0.1}
    run: dict[str, Any] = {"sizes": "8x8", "rank": mixture.RANK, "batch": batch, "pairs": 8192, "guidance": 1.0}
    run |= {"learning_rate": RATE, "watch_every": 0, "preview_every": 0, "candidate_every": 0, "checkpointing": False}
    run |= {"student_steps": steps, "seed": seed, "start": 1.0, "ema": 0.99}
    return settings_for(method, **run, **{name: value for name, value in told.items() if name in own})


@torch.no_grad()
def drawn(host: mixture.MixtureHost, path: Path, recipe: Any, count: int) -> list[Tensor]:
    """[count, 2] of each prompt, by the student in the file."""
    roles: Roles = host.denoiser.roles
    roles.load("drawn", load_lora(path, list(roles.targets), host.family).state, host.device)
    draws, found = torch.Generator().manual_seed(11), []
    with roles.installed(), roles.use("drawn"):
        for prompt in mixture.PROMPTS:
            cond, shape = host.texts([prompt] * count), (count, 2, 1, 1)
            x = sample(
                host.denoiser,
                recipe,
                cond,
                torch.randn(shape, generator=draws),
                lambda step, shape=shape: torch.randn(shape, generator=draws),
            )
            found.append(x.flatten(1))
    return found


def row(method: str, steps: int, seed: int, args: Any) -> dict[str, Any]:
    """Trains and measures it. A method that fails has its reason."""
    begun, base = time.monotonic(), args.runs / f"mixture-{args.prediction}.safetensors"

    def make_host() -> mixture.MixtureHost:
        return mixture.base(args.prediction, base)

    told: dict[str, Any] = {"world": "mixture", "method": method, "steps": steps, "seed": seed}
    try:
        settings = settled(settings_of(method, steps, seed, args.batch), args.forwards, make_host, mixture.PROMPTS)
        folder = args.runs / f"{method}-{steps}-{seed}"
        host = make_host()
        result = distil(host, mixture.PROMPTS, settings, folder, existing="continue")
        found = mixture.measures(drawn(make_host(), result.path, result.recipe, args.samples))
    except Exception as error:  # a method that fails is a row as well
        return told | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    told |= {"updates": result.updates, "forwards": round(cost(settings, make_host, mixture.PROMPTS))}
    told |= {"seconds": round(time.monotonic() - begun, 1)}
    told |= {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    return told | {key: round(value, 4) for key, value in found.items()}


def one(job: tuple[str, int, int], args: Any) -> None:
    """In a process of its own: its peak of memory is the row's."""
    torch.set_num_threads(1)
    found = row(*job, args)
    print(json.dumps(found), flush=True)
    with (args.runs / "rows.jsonl").open("a") as file:
        file.write(json.dumps(found) + "\n")


def known(path: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
