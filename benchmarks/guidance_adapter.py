"""Guidance in one forward, measured: how near an adapter comes to classifier-free guidance, and what its dial does.

    python benchmarks/guidance_adapter.py --model tiny --prompts FILE --minutes 20 --runs runs/guidance \\
        --reference FILE.npz --out benchmarks/results/guidance-adapter-tiny.md --set steps=8000 batch=16

Every eighth prompt is held out of training; --captions teaches the captions of --reference in place of the others, but
for those of the same things. On the held-out ones, on the guided teacher's own trajectories at scales that training
never drew, the error |D_agd - D_w|^2 is compared with what there is to add, |D_w - D_c|^2. The dial is the share of D_c
- D_u that the adapter adds, which for guidance itself is w - 1. With real pictures in --reference, what the adapter
draws stands beside what guidance draws, at the settings' guidance. --minutes are of processor time.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import data
from torch import Tensor

from onestep.cli.evaluate import judge_of, read_pictures
from onestep.cli.model import at_native_size, open_host, read_prompts
from onestep.core import randomness
from onestep.core.adapter_file import load_adapter
from onestep.core.denoiser import both
from onestep.core.guidance_adapter import MAKERS, with_guidance
from onestep.core.roles import TEACHER
from onestep.core.sampling import trajectory
from onestep.core.schedule import expand, log_snr
from onestep.pipelines.tiny_words import stem_of
from onestep.training.distil import Progress, distil
from onestep.training.evaluation.evaluate import Student, evaluate
from onestep.training.methods import settings_for
from onestep.training.settings import Settings

SCALES = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
DIAL = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0)
EVERY = 8
ROLE = "measured"
MICRO = 16


@dataclass
class Seen:
    """States [N, ...] of the guided teacher, and its answers there."""

    x: Tensor
    sigma: Tensor
    d_c: Tensor
    d_u: Tensor
    cond: Any


def captions(path: Path, held: list[str]) -> list[str]:
    """Each tile's caption in two forms drawn at random, as its model learnt them; none of a thing that is held out."""
    tiles, draw = data.load(path), random.Random(0)
    things = {stem_of(prompt.split(",")[0]) for prompt in held if ":" in prompt}
    found: dict[str, None] = {}
    for caption, words in 2 * list(zip(tiles.captions, tiles.words, strict=True)):
        form = draw.random() > data.NAME_DROPPED, draw.random() < data.WORD_DROPPED, draw.random() < data.WORD_DROPPED
        prompt = data.prompt(caption, words, *form)
        if prompt not in held and stem_of(prompt.split(",")[0]) not in things:
            found[prompt] = None
    prompts = list(found)
    draw.shuffle(prompts)
    return prompts


def train(args: argparse.Namespace, host: Any, settings: Settings, prompts: list[str]) -> tuple[Any, float]:
    """The run's result, which ends with its schedule or after --minutes; the seconds of processor time it took."""
    began = time.process_time()

    def report(progress: Progress) -> bool:
        if progress.update % 50 == 0:
            numbers = {name: round(value, 4) for name, value in progress.numbers.items()}
            print(progress.update, f"{time.process_time() - began:.0f} s of processor", numbers, flush=True)
        return time.process_time() - began > 60 * args.minutes

    result = distil(host, prompts, settings, args.runs / Path(args.model).name, existing="continue", report=report)
    return result, time.process_time() - began


@torch.no_grad()
def states(host: Any, prompts: list[str], w: float, steps: int, size: tuple[int, int], each: int) -> Iterator[Seen]:
    """``each`` states of a trajectory at ``w`` for each prompt, spread over its steps, in slices."""
    cond, null = host.encode(prompts, size), host.encode([""], size)
    noise = randomness.normal(host.latent_shape(size), 1234, "held out", 0, range(len(prompts))).to(host.device)
    kept = torch.linspace(0, steps - 1, each).round().long().tolist()
    for rows in torch.arange(len(prompts)).split(MICRO):
        part = cond[rows]
        with host.denoiser.roles.use(TEACHER):
            for step, (x, sigma, _) in enumerate(
                trajectory(host.denoiser, part, part.null_like(null), noise[rows], steps, w)
            ):
                if step in kept:
                    yield Seen(x, sigma, *both(host.denoiser, x, sigma, part, part.null_like(null)), part)


@torch.no_grad()
def answer(host: Any, seen: Seen, w: float) -> Tensor:
    with host.denoiser.roles.use(ROLE):
        return host.denoiser(seen.x, seen.sigma, with_guidance(seen.cond, w))


def errors(host: Any, seen: Seen, w: float) -> tuple[float, Tensor]:
    """lambda, and (|D_agd - D_w|^2, |D_w - D_c|^2) in x0 and in the noise, summed over a slice: [2, 2]."""
    d_w = seen.d_u + w * (seen.d_c - seen.d_u)
    both_errors = torch.stack([answer(host, seen, w) - d_w, d_w - seen.d_c]).double().square()
    schedule = host.denoiser.schedule
    weight = expand((schedule.alpha(seen.sigma) / seen.sigma) ** 2, d_w)
    sums = torch.stack([both_errors, weight * both_errors]).flatten(2).sum(2)
    return float(log_snr(schedule, seen.sigma)[0]), sums


def near(host: Any, prompts: list[str], settings: Settings, size: tuple[int, int]) -> list[str]:
    """The table of ratios by scale, over all states and by thirds of the noise."""
    lines = ["| w | x0 | noise | x0, noisy third | middle | clean |", "|---|---|---|---|---|---|"]
    for w in SCALES:
        found = [errors(host, seen, w) for seen in states(host, prompts, w, settings.teacher_steps, size, each=9)]
        levels = sorted({level for level, _ in found})
        whole = sum(sums for _, sums in found)
        thirds = [sum(s for level, s in found if level in levels[at : at + 3]) for at in (0, 3, 6)]
        ratios = [whole[0, 0] / whole[0, 1], whole[1, 0] / whole[1, 1], *(s[0, 0] / s[0, 1] for s in thirds)]  # type: ignore[index]
        lines.append(f"| {w:g} | " + " | ".join(f"{float(ratio):.3f}" for ratio in ratios) + " |")
        print(lines[-1], flush=True)
    return lines


def dial(host: Any, prompts: list[str], settings: Settings, size: tuple[int, int]) -> tuple[list[str], bool]:
    """The share of D_c - D_u that is added at each scale, on the states of one guidance; whether it always grows."""
    seen = list(states(host, prompts[:MICRO], settings.guidance, settings.teacher_steps, size, each=5))
    shares = []
    for w in DIAL:
        pairs = [(answer(host, here, w) - here.d_c, here.d_c - here.d_u) for here in seen]
        shares.append(sum(float((a * d).sum()) for a, d in pairs) / sum(float(d.square().sum()) for _, d in pairs))
    grows = all(later > earlier for earlier, later in zip(shares, shares[1:], strict=False))
    cells = [" | ".join(f"{w:g}" for w in DIAL), " | ".join(f"{share:.2f}" for share in shares)]
    return [f"| w | {cells[0]} |", "|---|" + "---|" * len(DIAL), f"| added | {cells[1]} |"], grows


def beside(
    args: argparse.Namespace, host: Any, side: Any, recipe: Any, settings: Settings, prompts: list[str]
) -> list[str]:
    """The evaluation's table of the guided teacher and the adapter, with intervals."""
    student = Student("adapter, one forward a step", {}, recipe, side=side, dial=settings.guidance)
    told = {"size": settings.size_list[0], "guidance": settings.guidance, "teacher_steps": settings.teacher_steps}
    real, judge = read_pictures(args.reference), judge_of(args.model, None)
    table, _ = evaluate(host, [student], prompts, args.samples, real, judge, **told)
    about = f"Pictures at guidance {settings.guidance:g}, {settings.teacher_steps} steps, {args.samples} a row"
    return ["", f"{about}, all prompts:", "", "```", table.to_text(), "```"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the settings")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--runs", type=Path, default=Path("runs/guidance"))
    parser.add_argument("--reference", type=Path, help="real pictures")
    parser.add_argument("--captions", action="store_true", help="teach the captions of --reference")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    prompts = read_prompts(args.prompts)
    held, taught = prompts[::EVERY], [prompt for at, prompt in enumerate(prompts) if at % EVERY]
    taught = captions(args.reference, held) if args.captions else taught
    host = open_host(args.model, "all", args.device)
    changes = dict(text.split("=", 1) for text in args.set)
    settings = at_native_size(settings_for("agd", checkpointing=False).with_texts(changes), set(), host)
    (result, seconds), size = train(args, host, settings, taught), settings.size_list[0]
    side = load_adapter(result.path, MAKERS, host.family).module
    host.denoiser.roles.add_module(ROLE, side)
    with host.denoiser.roles.installed():
        ratios = near(host, held, settings, size)
        added, grows = dial(host, held, settings, size)
    own, base = (sum(p.numel() for p in module.parameters()) for module in (side, host.network))
    told = [
        f"`{Path(args.model).name}`, agd with {json.dumps(changes)}: {result.updates} updates in "
        f"{seconds / 60:.1f} minutes of processor time, {own} parameters on {base} ({own / base:.1%}), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}. "
        f"{len(taught)} prompts taught, {len(held)} held out.",
        "",
        "|D_agd - D_w|^2 / |D_w - D_c|^2, in x0 and in the noise:",
        "",
        *ratios,
        "",
        f"The dial: what is added, in units of D_c - D_u (guidance itself: w - 1). Always growing: {grows}.",
        "",
        *added,
    ]
    told += beside(args, host, side, result.recipe, settings, prompts) if args.reference else []
    print("\n".join(told))
    if args.out:
        args.out.write_text("\n".join(told) + "\n", "utf-8")


if __name__ == "__main__":
    main()
