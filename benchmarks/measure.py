"""Measures that need no judge, ranked by how well they order a run's states as the judge does.

    python benchmarks/measure_states.py --model tiny --out runs/measure/tiny
    python benchmarks/measure.py score --model tiny --states runs/measure/tiny --reference tiles.npz
    python benchmarks/measure.py table --states runs/measure/tiny --out benchmarks/results/measure.md
    python benchmarks/measure.py score --model tiny-flow --states runs/recipe --finished "switch-4-*" --out runs/four

`score` takes the states in a random order and writes what it has found as it goes; it goes on where it was stopped.
The judge sees --samples pictures of a state, twice, from two sets of prompts and noises; each candidate sees
--watched pictures, as the watch does, also twice, from the noise that the teacher's were drawn from.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure_features import DISTANCES, SHARES, look, of_latents
from measure_states import ROLES, read_state
from measure_table import table
from torch import Tensor

from onestep.cli.evaluate import judge_of, read_pictures
from onestep.cli.lora import read_lora
from onestep.cli.model import open_host, read_prompts
from onestep.core import randomness
from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.factors import State
from onestep.core.recipe import Recipe
from onestep.core.roles import TEACHER
from onestep.core.sampling import sample, teacher_sample
from onestep.core.tensor_file import read_tensors, write_tensors
from onestep.training.evaluation.measures import frechet
from onestep.training.watch.measures import compare, patch_distance

EACH, ROLE, GUIDANCE, TEACHER_STEPS = 4, "measured", 4.0, 25


@dataclass
class Set:
    """Pictures to be drawn: their prompts and conditions, and the teacher's and the student's unit noise."""

    name: str
    texts: list[str]
    cond: Cond
    null: Cond
    teachers: Tensor
    students: Tensor

    def teacher(self, host: Any, file: Path) -> Tensor:
        """The teacher's latents, drawn once."""
        if not file.is_file():
            with host.denoiser.roles.use(TEACHER):
                drawn = [
                    teacher_sample(
                        host.denoiser, self.cond[rows], self.cond[rows].null_like(self.null), self.teachers[rows],
                        TEACHER_STEPS, GUIDANCE, second_order=True,
                    )
                    for rows in torch.arange(len(self.teachers)).split(32)
                ]  # fmt: skip
            write_tensors(file, {"x": torch.cat(drawn)})
        return read_tensors(file)["x"][: len(self.teachers)]

    def student(self, host: Any, recipe: Recipe) -> Tensor:
        """The latents of the role that is measured."""

        def fresh(rows: Tensor) -> Any:
            shape = self.students.shape[1:]
            return lambda step: randomness.normal(shape, 0, f"{self.name} renoise {step}", 0, rows.tolist())

        with host.denoiser.roles.use(ROLE, train=False):
            return torch.cat(
                [
                    sample(host.denoiser, recipe, self.cond[rows], self.students[rows], fresh(rows))
                    for rows in torch.arange(len(self.students)).split(32)
                ]
            )


def make_set(host: Any, prompts: list[str], name: str, samples: int, same: bool) -> Set:
    """``samples`` pictures of random prompts, `EACH` of one. same: whether teacher and student start alike."""
    size, count = host.native_size, samples // EACH
    order = torch.randperm(len(prompts), generator=randomness.generator("measure", name))
    texts = [prompts[int(order[row % len(prompts)])] for row in range(count)]
    shape, rows = host.latent_shape(size), range(count * EACH)
    teachers = randomness.normal(shape, 0, f"{name} teacher", 0, rows)
    students = teachers if same else randomness.normal(shape, 0, f"{name} student", 0, rows)
    each = [text for text in texts for _ in range(EACH)]
    return Set(name, each, host.encode(texts, size).repeat(EACH), host.encode([""], size), teachers, students)


def pictures(host: Any, latents: Tensor) -> Tensor:
    return torch.cat([host.decode(part) for part in latents.split(64)])


def seen(host: Any, latents: Tensor, kept: Set) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features by level and block, the base's answer less the latents by level."""
    features, errors = {}, {}
    for share in SHARES:
        found, errors[f"{share}"] = look(host, latents, kept.cond, share, 0)
        features |= {f"{share} {block}": value for block, value in enumerate(found)}
    return features, errors


def candidates(student: Tensor, teacher: Tensor, mine: Any, theirs: Any) -> dict[str, float]:
    """Every candidate: today's measures, and each distance of the features, by level, of means and deviations."""
    found = {f"today: {name}": value for name, value in compare(student, teacher, EACH).items()}
    found |= of_latents(student, teacher)
    (features, errors), (wanted, right) = mine, theirs
    for share in SHARES:
        name = f"{share}"
        size = [side[name].square().mean() for side in (errors, right)]
        found[f"denoising error @{name}"] = abs(float((size[0] / size[1]).log()))
        found[f"patches of the error @{name}"] = patch_distance(errors[name], right[name]) / float(size[1].sqrt())
        found[f"patches of the answer @{name}"] = patch_distance(student + errors[name], teacher + right[name])
        keys = [key for key in wanted if key.startswith(f"{name} ")]
        for part, half in (("mean", 0), ("deviation", 1)):
            for distance, measure in DISTANCES.items():
                values = [measure(features[key].chunk(2, 1)[half], wanted[key].chunk(2, 1)[half]) for key in keys]
                for block, value in enumerate(values):
                    found[f"{distance} of {part} @{name} #{block}"] = value
    return found


def student_of(file: Path, host: Any) -> tuple[State, Recipe]:
    """Of a state that a run kept, or of a finished run's result."""
    if file.name == "result.safetensors":
        lora = read_lora(str(file), host)
        if lora.later:
            raise OneStepError(f"{file.parent} has a LoRA for each step: choose runs of one LoRA with --finished")
        return lora.state, lora.recipe
    return read_state(file), Recipe.from_json((file.parents[1] / "recipe.json").read_text())


def score(args: argparse.Namespace) -> None:
    """A line of score.jsonl for each state."""
    host, prompts = open_host(args.model, device="cpu"), read_prompts(args.prompts)
    pattern = f"{args.finished}/result.safetensors" if args.finished else f"*/*-{args.role}.safetensors"
    files = sorted(args.states.glob(pattern))
    recipe = student_of(files[0], host)[1]
    judge = judge_of(args.model, args.judge)
    folder = args.out or args.states
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "score.jsonl"
    known = {json.loads(line)["state"] for line in out.read_text().splitlines()} if out.is_file() else set()
    real = judge.features(read_pictures(args.reference)) if args.reference else None
    judged = [make_set(host, prompts, f"judge {at}", args.samples, same=False) for at in range(2)]
    watched = [make_set(host, prompts, f"watch {at}", args.watched, same=True) for at in range(2)]
    with torch.no_grad(), host.denoiser.roles.installed():
        teachers = {kept.name: kept.teacher(host, folder / f"{kept.name}.safetensors") for kept in judged + watched}
        wanted = {kept.name: judge.features(pictures(host, teachers[kept.name])) for kept in judged}
        theirs = {kept.name: seen(host, teachers[kept.name], kept) for kept in watched}
        random.Random(0).shuffle(files)
        for file in files:
            name = file.relative_to(args.states).with_suffix("").as_posix()
            if name in known:
                continue
            began = time.monotonic()
            host.denoiser.roles.load(ROLE, student_of(file, host)[0])
            line: dict[str, Any] = {"state": name}
            for kept in judged:
                features = judge.features(pictures(host, kept.student(host, recipe)))
                line[kept.name] = {"fd": frechet(features, wanted[kept.name])}
                if real is not None:
                    line[kept.name]["fd_real"] = frechet(features, real)
            line["judge, seconds"], began = time.monotonic() - began, time.monotonic()
            for kept in watched:
                latents = kept.student(host, recipe)
                mine = seen(host, latents, kept)
                line[kept.name] = candidates(latents, teachers[kept.name], mine, theirs[kept.name])
            line["candidates, seconds"] = time.monotonic() - began
            with out.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            print(name, line["judge 0"], *(f"{line[key]:.1f} s" for key in line if "seconds" in key), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("score", "table"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--judge", help="a judge's folder; a bundled model has its own")
    parser.add_argument("--prompts", default="pipelines/tiny/prompts.txt")
    parser.add_argument("--states", type=Path, nargs="+", required=True)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--samples", type=int, default=768)
    parser.add_argument("--role", default="*", choices=("*", *ROLES), help="whose states are scored")
    parser.add_argument("--finished", help="in place of kept states: the runs in --states whose results are scored")
    parser.add_argument("--watched", type=int, default=64)
    parser.add_argument("--times", type=float, default=2.0, help="of the best state's FD-local: those that are ranked")
    parser.add_argument("--out", type=Path, help="of score, a folder (--states); of table, a file (standard output)")
    args = parser.parse_args()
    if args.what == "table":
        table(args.states, args.out, args.times)
        return
    (args.states,) = args.states
    score(args)


if __name__ == "__main__":
    main()
