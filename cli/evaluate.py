"""onestep evaluate: LoRAs beside their teacher and its floors, as a table."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import OneStepError
from ..training.evaluation.evaluate import Student, evaluate
from ..training.evaluation.table import Table
from ..training.runs.files import write_bytes
from ..training.settings import Settings
from .console import Console
from .generate import denoiser_with
from .lora import Lora, read_student
from .model import open_host, parse_size, read_prompts
from .parser import existing_parent

MOST_SAMPLES = 100_000
MOST_STEPS = 1000


def run(args: Namespace, console: Console) -> None:
    _check(args)
    prompts = read_prompts(args.prompts)
    reference = None if args.reference is None else read_pictures(Path(args.reference))
    host = open_host(args.model, device=args.device)
    loras = [read_student(file, host) for file in args.lora]
    table, _ = measure(host, loras, prompts, args, reference, judge_of(args.model, args.judge), console)
    if args.json not in (None, "-"):
        write_bytes(Path(args.json), table.to_json().encode())
    console.result(table.to_text(), json.loads(table.to_json()))


def measure(
    host: Any, loras: list[Lora], prompts: list[str], args: Namespace, reference: Any, judge: Any, console: Console
) -> tuple[Table, dict[str, Tensor]]:
    """`training.evaluation.evaluate` with a progress bar. The guidance is what the first LoRA was trained at."""
    trained = loras[0].settings if loras else {}
    guidance = args.guidance if args.guidance is not None else float(trained.get("guidance", Settings.guidance))
    with console.counted((3 + len(loras)) * args.samples, "drawing") as more:
        return evaluate(
            host,
            [student_of(lora, host, name, guidance) for lora, name in zip(loras, names_of(loras), strict=True)],
            prompts,
            args.samples,
            reference,
            judge,
            args.seed,
            size=_size(args, loras, host),
            guidance=guidance,
            teacher_steps=args.teacher_steps,
            report=more,
        )


def student_of(lora: Lora, host: Any, name: str, guidance: float = 1.0) -> Student:
    """The LoRA as the evaluation takes it; an adapter at the teacher's guidance."""
    denoiser = None if lora.recipe == lora.recipe.of_base else denoiser_with(host, lora.recipe)
    return Student(name, lora.state, lora.recipe, denoiser, lora.module, guidance, lora.later, lora.router)


def names_of(loras: list[Lora]) -> list[str]:
    """A name for each row; numbered where two files share theirs."""
    names = [lora.name for lora in loras]
    return [name if names.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(names, 1)]


def judge_of(model: str, folder: str | None) -> Any:
    """The judge of a bundled model, or the one in ``folder``; None for a model that has none."""
    from ..pipelines.bundled import MODELS, path_of
    from ..training.evaluation.judge import Judge

    if folder is None and model not in MODELS:
        return None
    return Judge.load(folder or path_of("judge"))


def read_pictures(path: Path) -> Tensor:
    """[N, 3, H, W] in [0, 1] of an .npz with `image` [N, H, W, 3], 0..255. Raises OneStepError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["image"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        why = str(error).strip().split("\n")[0][:120]
        raise OneStepError(f"{path.name[:100]} cannot be read as pictures ({why}): give an .npz with `image`") from None
    except Exception as error:  # zipfile and zlib have errors of their own
        raise OneStepError(
            f"{path.name[:100]} is damaged ({type(error).__name__}): give an .npz with `image`"
        ) from None
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or len(images) < 2:
        found = f"{images.dtype} {list(images.shape)}"
        raise OneStepError(f"`image` in {path.name[:100]} is {found}: it must be uint8 [N, H, W, 3], N at least 2")
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def _size(args: Namespace, loras: list[Lora], host: Any) -> tuple[int, int]:
    trained = [size for lora in loras for size in lora.recipe.sizes[:1]]
    size = parse_size(args.size) if args.size else (trained[0] if trained else host.native_size)
    host.latent_shape(size)
    return size


def _check(args: Namespace) -> None:
    """Everything that can be refused before a model is loaded."""
    if not 2 <= args.samples <= MOST_SAMPLES:
        raise OneStepError(f"--samples is {args.samples}: give 2 to {MOST_SAMPLES}; 256 or more tell something")
    if not 1 <= args.teacher_steps <= MOST_STEPS:
        raise OneStepError(f"--teacher-steps is {args.teacher_steps}: give 1 to {MOST_STEPS}")
    if args.guidance is not None and not 0 <= args.guidance <= 30:
        raise OneStepError(f"--guidance is {args.guidance:g}: give 0 to 30; 1 is none")
    if args.json not in (None, "-"):
        existing_parent(Path(args.json))
    if args.size is not None:
        parse_size(args.size)
