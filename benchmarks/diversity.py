"""Does a few-step student gain variety where the base draws the first part, and what does that cost?

    python benchmarks/diversity.py --model tiny --lora one.safetensors four.safetensors --reference tiles.npz \\
        --samples 512 --base-steps 4 8 --hand-over 0 0.5 0.25 --out benchmarks/results/diversity-tiny.md

Every row draws the same prompts from the same noise. "then base": the base takes the student's steps too, unguided:
what the student adds is the difference. forwards: of the network, for one picture; the base's are guided, two
a step. variety: mean distance of a prompt's pictures in the judge's features, of the teacher's. 95% intervals.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onestep.cli.evaluate import judge_of, read_pictures
from onestep.cli.lora import read_lora
from onestep.cli.model import open_host, read_prompts
from onestep.core import randomness
from onestep.core.cond import Cond
from onestep.core.diversity import base_levels, descend, remaining
from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.core.roles import TEACHER
from onestep.core.sampling import sample
from onestep.training.evaluation.scores import Scores, look

ROLE = "student"
EACH = 4
BATCH = 64
SHOWN = ("fd_real", "group", "colour", "variety")


@dataclass
class Stage:
    """What every row draws. cond, noise: of all N pictures, EACH of one prompt after the other."""

    host: Any
    cond: Cond
    null: Cond
    noise: Tensor
    guidance: float

    @torch.no_grad()
    def draw(self, levels: Tensor | None, rest: Recipe, role: str) -> Tensor:
        """Pictures [N, 3, H, W]: the base through ``levels``, then ``role`` by ``rest``."""
        return torch.cat([self._part(rows, levels, rest, role) for rows in torch.arange(len(self.noise)).split(BATCH)])

    def _part(self, rows: Tensor, levels: Tensor | None, rest: Recipe, role: str) -> Tensor:
        cond, x, denoise = self.cond[rows], self.noise[rows], self.host.denoiser

        def fresh(step: int) -> Tensor:
            return randomness.normal(tuple(x.shape[1:]), 0, f"diversity renoise {step}", 0, rows.tolist())

        if levels is not None:
            with denoise.roles.use(TEACHER):
                x = descend(denoise, levels, cond, cond.null_like(self.null), x, self.guidance)
        with denoise.roles.use(role, train=False):
            return self.host.decode(sample(denoise, rest, cond, x, fresh, cond.null_like(self.null)))  # type: ignore[no-any-return]


def staged(args: argparse.Namespace, host: Any, prompts: list[str]) -> tuple[Stage, list[str]]:
    count = args.samples // EACH
    order = torch.randperm(len(prompts), generator=randomness.generator(args.seed, "diversity prompts"))
    rows = order[torch.arange(count) % len(prompts)].repeat_interleave(EACH)
    size = host.native_size
    cond = host.encode(prompts, size)[rows]
    noise = randomness.normal(host.latent_shape(size), args.seed, "diversity", 0, range(len(rows)))
    return Stage(host, cond, host.encode([""], size), noise, args.guidance), [prompts[row] for row in rows.tolist()]


def rows(args: argparse.Namespace, stage: Stage) -> Iterator[tuple[str, int, Tensor]]:
    """(name, forwards, pictures) of each row; the teacher first."""
    schedule = stage.host.denoiser.schedule
    whole = Recipe.for_student(schedule, args.teacher_steps, stage.host.family, ())
    teacher = replace(whole, renoise=False, guidance=args.guidance)
    yield f"teacher, {args.teacher_steps} steps", 2 * args.teacher_steps, stage.draw(None, teacher, TEACHER)
    for path in args.lora:
        lora = read_lora(str(path), stage.host)
        recipe = lora.recipe
        stage.host.denoiser.roles.load(ROLE, {name: (a, b * recipe.lora_scale) for name, (a, b) in lora.state.items()})
        name = f"{recipe.steps}-step student"
        yield f"{name} alone", recipe.steps, stage.draw(None, recipe, ROLE)
        yield from handed(args, stage, recipe, name)


def handed(args: argparse.Namespace, stage: Stage, recipe: Recipe, name: str) -> Iterator[tuple[str, int, Tensor]]:
    schedule = stage.host.denoiser.schedule
    for share in args.hand_over:
        try:
            rest = remaining(recipe, schedule, share)
        except OneStepError:  # a level that this student does not begin below
            continue
        for steps in args.base_steps:
            levels = base_levels(schedule, steps, schedule, rest)
            taken = len(levels) - 1
            said = f"base {taken} of {steps} steps to time {rest.timesteps[0]:g}"
            yield f"{said}, then {name}", 2 * taken + rest.steps, stage.draw(levels, rest, ROLE)
        yield f"{said}, then base", 2 * taken + rest.steps, stage.draw(levels, rest, TEACHER)


def main() -> None:
    args = arguments()
    host, prompts, judge = open_host(args.model, device="cpu"), read_prompts(args.prompts), judge_of(args.model, None)
    stage, texts = staged(args, host, prompts)
    reference = read_pictures(args.reference)
    chosen = torch.randperm(len(reference), generator=randomness.generator(args.seed, "diversity reference"))
    real = look(reference[chosen[: len(texts)]], judge, args.seed)
    scores, teacher = Scores(len(texts) // EACH, EACH, args.seed, judge.asked(texts)), None
    lines = ["| pictures | forwards | FD-local to real | group | colour | variety |", "|---|---|---|---|---|---|"]
    for name, forwards, images in rows(args, stage):
        seen = look(images, judge, args.seed)
        teacher = teacher or seen
        found = scores(seen, teacher, real)
        cells = [f"{found[key].value:.3f} ± {found[key].high - found[key].value:.3f}" for key in SHOWN]
        lines.append(f"| {name} | {forwards} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    about = (
        f"`{args.model}`, {len(texts)} pictures a row, base's guidance {args.guidance:g}, seed {args.seed}; "
        f"torch {torch.__version__}, {platform.machine()}."
    )
    if args.out:
        args.out.write_text("\n".join([about, "", *lines]) + "\n", "utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--lora", type=Path, nargs="+", required=True)
    parser.add_argument("--prompts", default="pipelines/tiny/prompts.txt")
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--base-steps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--hand-over", type=float, nargs="+", default=[0.0])
    parser.add_argument("--teacher-steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
