"""onestep generate: pictures of a checkpoint, as it is or with a LoRA by its recipe."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import OneStepError
from ..core.recipe import Recipe
from ..core.roles import TEACHER, State
from ..core.sampling import sample, teacher_sample
from ..core.step_roles import part_of
from ..training.engine.prompts import check_prompts
from ..training.settings import Settings
from .console import Console, duration
from .lora import Lora, in_steps, read_lora
from .model import open_host, parse_size
from .parser import existing_parent
from .pictures import write_sheet

ROLE = "student"
TEACHER_STEPS = 25
MOST_STEPS = 1000


def run(args: Namespace, console: Console) -> None:
    prompts = check_prompts(args.prompt)
    path = Path(args.out)
    _check(args, path)
    host = open_host(args.model, device=args.device)
    lora = None if args.lora is None else read_lora(args.lora, host, args.recipe)
    if idle_negative(args, host, lora):
        console.note(
            "--negative does nothing here, where guidance is off: without guidance it acts in Python, by "
            'OneStepPipeline(negative_prompt=..., steering="nag"), and in ComfyUI, by Negative Steering'
        )
    size = size_of(args, host, lora)
    students = students_of(host, prompts, lora, size)
    for prompt, student in zip(prompts, students, strict=False):
        console.note(f"{student} draws {prompt[:60]!r}")
    latents, steps, seconds = draw(host, prompts, lora, args, size)
    write_sheet(path, host.decode(latents))
    facts = {
        "path": str(path),
        "prompts": prompts,
        "seed": args.seed,
        "size": list(size),
        "steps": steps,
        "seconds": round(seconds, 3),
        "lora": args.lora,
        "students": students,
        "recipe": None if lora is None else json.loads(lora.recipe.to_json()),
    }
    many = f"{len(prompts)} pictures" if len(prompts) > 1 else "1 picture"
    console.result(f"{path}: {many} in {steps} step{'s' * (steps > 1)}, {duration(seconds)}", facts)


def idle_negative(args: Namespace, host: Any, lora: Lora | None) -> bool:
    """Whether there is a negative prompt, and no guidance that would steer away from it."""
    usual = Settings.guidance if lora is None else lora.recipe.guidance
    wanted = usual if args.guidance is None else args.guidance
    return bool(args.negative) and (host.denoiser.guidance != "cfg" or wanted == 1)


def students_of(host: Any, prompts: list[str], lora: Lora | None, size: tuple[int, int]) -> list[str]:
    """Of a router's students the file of each prompt's; [] of a LoRA that serves all."""
    if lora is None or lora.router is None:
        return []
    return [lora.files[student] for student in lora.router.of(host.encode(prompts, size))]


def draw(
    host: Any, prompts: list[str], lora: Lora | None, args: Namespace, size: tuple[int, int]
) -> tuple[Tensor, int, float]:
    """Latents [N, C, h, w] on the CPU, the steps taken and the seconds of sampling, one picture at a time."""
    cond = told_guidance(host.encode(prompts, size), host, lora, args).to(host.device)
    null = host.encode([args.negative], size, negative=True).to(host.device)
    noise = picture_noise(host.latent_shape(size), args.seed, len(prompts))
    one, steps = _teacher(host, args) if lora is None else _student(host, lora, args)
    began, pictures = time.monotonic(), []
    for row in range(len(prompts)):
        at = slice(row, row + 1)
        with torch.no_grad():
            pictures.append(one((cond[at], cond[at].null_like(null), args.seed + row), noise[at].to(host.device)).cpu())
    return torch.cat(pictures), steps, time.monotonic() - began


def told_guidance(cond: Any, host: Any, lora: Lora | None, args: Namespace) -> Any:
    """What embedded guidance is told: what was asked for, else what the LoRA was trained at, else the model's habit."""
    wanted = args.guidance if args.guidance is not None else (lora.settings if lora is not None else {}).get("guidance")
    if host.denoiser.guidance != "embedded" or wanted is None:
        return cond
    return cond.with_(guidance=torch.full((len(cond),), float(wanted)))


def picture_noise(shape: tuple[int, ...], seed: int, count: int) -> Tensor:
    """[count, C, h, w]: of picture i what ComfyUI's KSampler and diffusers draw first at seed + i."""
    drawn = (torch.Generator().manual_seed(seed + row) for row in range(count))
    return torch.cat([torch.randn(1, *shape, generator=generator) for generator in drawn])


def size_of(args: Namespace, host: Any, lora: Lora | None) -> tuple[int, int]:
    """What was asked for, else what the LoRA was trained at, else the model's own. OneStepError if it does not fit."""
    trained = lora.recipe.sizes[:1] if lora is not None else ()
    size = parse_size(args.size) if args.size else (trained[0] if trained else host.native_size)
    host.latent_shape(size)
    return size


def _teacher(host: Any, args: Namespace) -> tuple[Any, int]:
    steps = TEACHER_STEPS if args.steps is None else args.steps
    wanted = Settings.guidance if args.guidance is None else args.guidance
    guidance = wanted if host.denoiser.guidance == "cfg" else 1.0

    def one(told: Any, noise: Tensor) -> Tensor:
        with host.denoiser.roles.use(TEACHER):
            return teacher_sample(host.denoiser, told[0], told[1], noise, steps, guidance)

    return one, steps


def _student(host: Any, lora: Lora, args: Namespace) -> tuple[Any, int]:
    recipe = in_steps(lora.recipe.whole(), host, args.steps)
    if args.guidance is not None and host.denoiser.guidance != "embedded":
        recipe = replace(recipe, guidance=args.guidance)
    roles, denoise = host.denoiser.roles, host.denoiser
    for part, state in enumerate((lora.state, *lora.later)):
        roles.load(part_of(ROLE, part), scaled(state, lora.recipe), host.device)
    if lora.later:
        roles.steps.split(ROLE, lora.parts)
    if recipe != recipe.of_base:
        denoise = denoiser_with(host, recipe)

    def one(told: Any, noise: Tensor) -> Tensor:
        # ComfyUI's noise between steps is one stream, seeded with the next whole number
        stream = torch.Generator().manual_seed(told[2] + 1)

        def fresh(step: int) -> Tensor:
            return torch.randn(noise.shape, generator=stream).to(noise)

        with roles.use(ROLE, train=False):
            return sample(denoise, recipe, told[0], noise, fresh, told[1])

    return one, recipe.steps


def scaled(state: State, recipe: Recipe) -> State:
    """Factors at the strength that the recipe asks for."""
    return {name: (a, b * recipe.lora_scale) for name, (a, b) in state.items()}


def denoiser_with(host: Any, recipe: Recipe) -> Any:
    """The host's network, read as ``recipe`` says."""
    from ..pipelines.adapt import denoiser_of

    return denoiser_of(host.pipe, host.denoiser.roles, recipe=recipe)


def _check(args: Namespace, path: Path) -> None:
    """Everything that can be refused before a model is loaded."""
    existing_parent(path)
    if path.suffix.lower() != ".png":
        raise OneStepError(f"--out is {path.name[:100]!r}: pictures are written as .png")
    if args.steps is not None and not 1 <= args.steps <= MOST_STEPS:
        raise OneStepError(f"--steps is {args.steps}: give 1 to {MOST_STEPS}")
    if not 0 <= args.seed < 2**63 - 4096:
        raise OneStepError(f"--seed is {args.seed}: give 0 to {2**63 - 4097}")
    if args.guidance is not None and not 0 <= args.guidance <= 30:
        raise OneStepError(f"--guidance is {args.guidance:g}: give 0 to 30; 1 is none")
    if args.recipe is not None and args.lora is None:
        raise OneStepError("--recipe says how a LoRA is sampled: add --lora FILE")
    if args.size is not None:
        parse_size(args.size)
