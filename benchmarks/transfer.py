"""A LoRA made for the base, on the distilled model: how much of what it does there does it do here?

    python benchmarks/transfer.py --model tiny --lora one.safetensors --data tiles.npz --style blue --updates 150 \\
        --file style.safetensors --out benchmarks/results/transfer-tiny.md

The style is trained on the BASE alone, by plain denoising of restyled tiles with their captions; the student has never
seen it. Both then draw the same prompts from the same noise, the student with both LoRAs. shift: of the styled quantity
(blue: B - (R + G) / 2; bright: the mean), from strength 0. ratio: the student's shift over the base's, with its 95%
interval over prompts. FD to base: FD-local between the student's pictures and the base's at that strength. group: the
judge's agreement; the judge has never seen the style either, so that it is told for real restyled tiles as well.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from control import grid
from torch import Tensor

from onestep.cli.evaluate import judge_of, read_pictures
from onestep.cli.lora import read_lora
from onestep.cli.model import open_host, read_prompts
from onestep.core import randomness
from onestep.core.factors import State
from onestep.core.lora_file import fit, load_lora, save_lora
from onestep.core.recipe import Recipe
from onestep.core.roles import TEACHER
from onestep.core.sampling import sample, teacher_sample
from onestep.core.schedule import add_noise
from onestep.training.evaluation.measures import bootstrap, frechet

STYLE, BOTH = "style", "student and style"
EACH, BATCH, DROPPED = 4, 64, 0.1


@dataclass(frozen=True)
class Style:
    """paint: pictures [N, 3, H, W] in [0, 1], restyled. amount: [N] of the quantity that it changes."""

    paint: Callable[[Tensor], Tensor]
    amount: Callable[[Tensor], Tensor]


STYLES = {
    "blue": Style(
        lambda x: torch.cat([0.85 * x[:, :2], 0.85 * x[:, 2:] + 0.1], 1),
        lambda x: (x[:, 2] - x[:, :2].mean(1)).flatten(1).mean(1),
    ),
    "bright": Style(lambda x: 0.85 * x + 0.15, lambda x: x.flatten(1).mean(1)),
}


def train(args: argparse.Namespace, host: Any) -> State:
    """The style's factors: the noise's mean squared error (DDPM, arXiv:2006.11239, Eq. 14) on restyled tiles."""
    roles, schedule = host.denoiser.roles, host.denoiser.schedule
    latents, captions = tiles(args, host)
    null = len(captions)
    cond = host.encode([*captions, ""], host.native_size)
    roles.add(STYLE, args.rank, args.seed)
    optimizer = torch.optim.Adam(roles.parameters(STYLE), lr=args.rate)
    for update in range(args.updates):
        draw = randomness.generator(args.seed, f"style {update}")
        at = torch.randint(len(latents), (args.batch,), generator=draw)
        text = torch.where(torch.rand(args.batch, generator=draw) < DROPPED, null, at)
        sigma = schedule.sigma_at(0.02 + 0.96 * torch.rand(args.batch, generator=draw, dtype=torch.float64))
        x0, noise = latents[at], torch.randn(latents[at].shape, generator=draw)
        with roles.use(STYLE):
            found = host.denoiser(add_noise(schedule, x0, noise, sigma), sigma, cond[text])
        # noise' = (x - alpha D) / sigma, so that noise' - noise = alpha / sigma (x0 - D)
        weight = (schedule.alpha(sigma) / sigma) ** 2
        loss = (weight * (found - x0).double().square().flatten(1).mean(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update % 25 == 0:
            print(update, f"{float(loss):.4f}", flush=True)
    return {name: (a.clone(), b.clone()) for name, (a, b) in roles.state(STYLE).items()}


def tiles(args: argparse.Namespace, host: Any) -> tuple[Tensor, list[str]]:
    """Latents of restyled tiles, and their captions."""
    images, captions = captioned(args)
    return host.latents_of(STYLES[args.style].paint(images)), captions


def captioned(args: argparse.Namespace) -> tuple[Tensor, list[str]]:
    """Some real tiles, and their captions."""
    images = read_pictures(args.data)
    with np.load(args.data, allow_pickle=False) as file:
        captions = [str(text) for text in file["caption"]]
    chosen = torch.randperm(len(images), generator=randomness.generator(args.seed, "style tiles"))[: args.tiles]
    return images[chosen], [captions[row] for row in chosen.tolist()]


def stacked(student: State, style: State, strength: float) -> State:
    """Both products as one: [B1, s B2] [A1; A2] = B1 A1 + s B2 A2."""
    found = dict(student)
    for name, (a, b) in style.items():
        mine = student.get(name)
        found[name] = (
            (a, strength * b) if mine is None else (torch.cat([mine[0], a]), torch.cat([mine[1], strength * b], 1))
        )
    return found


@dataclass
class Stage:
    host: Any
    prompts: list[str]
    steps: int
    guidance: float
    seed: int

    def __post_init__(self) -> None:
        size = self.host.native_size
        self.cond, self.null = self.host.encode(self.prompts, size), self.host.encode([""], size)
        self.noise = randomness.normal(self.host.latent_shape(size), self.seed, "transfer", 0, range(len(self.prompts)))

    @torch.no_grad()
    def draw(self, state: State, recipe: Recipe | None) -> Tensor:
        """Pictures [N, 3, H, W] under ``state``: by ``recipe``, or in the base's steps."""
        self.host.denoiser.roles.load(BOTH, state)
        with self.host.denoiser.roles.use(BOTH if state else TEACHER, train=False):
            return torch.cat([self._part(rows, recipe) for rows in torch.arange(len(self.prompts)).split(BATCH)])

    def _part(self, rows: Tensor, recipe: Recipe | None) -> Tensor:
        cond, noise, denoise = self.cond[rows], self.noise[rows], self.host.denoiser
        if recipe is None:
            x = teacher_sample(denoise, cond, cond.null_like(self.null), noise, self.steps, self.guidance)
        else:
            x = sample(
                denoise,
                recipe,
                cond,
                noise,
                lambda step: randomness.normal(tuple(noise.shape[1:]), self.seed, f"transfer {step}", 0, rows.tolist()),
            )
        return self.host.decode(x)  # type: ignore[no-any-return]


def ratio(student: Tensor, base: Tensor) -> str:
    """Of the mean shifts [N], with its interval over prompts."""
    found = bootstrap(lambda rows: float(student[rows].mean() / base[rows].mean()), len(base) // EACH, EACH)
    return f"{found.value:.2f} ± {found.high - found.value:.2f}"


def main() -> None:
    args = arguments()
    host, judge = open_host(args.model, device="cpu"), judge_of(args.model, None)
    lora, amount = read_lora(str(args.lora), host), STYLES[args.style].amount
    began = time.process_time()
    if not args.file.exists():
        save_lora(args.file, train(args, host), host.family)
    trained = time.process_time() - began
    style = fit(load_lora(args.file, None, host.family).state, list(host.denoiser.roles.targets.values()))
    prompts = read_prompts(args.prompts)
    order = torch.randperm(len(prompts), generator=randomness.generator(args.seed, "transfer prompts"))
    chosen = [prompts[at] for at in order[: args.samples // EACH].repeat_interleave(EACH).tolist()]
    stage = Stage(host, chosen, args.teacher_steps, args.guidance, args.seed)
    lines = [
        "| strength | base: shift | base: group | student: shift | ratio | student: group | FD to base |",
        "|---|---|---|---|---|---|---|",
    ]
    start: dict[str, Tensor] = {}
    shown: list[Tensor] = []
    for strength in args.strengths:
        sets = {
            "base": stage.draw(stacked({}, style, strength) if strength else {}, None),
            "student": stage.draw(stacked(lora.state, style, strength), lora.recipe),
        }
        shifts = {name: amount(images) - start.setdefault(name, amount(images)) for name, images in sets.items()}
        groups = {name: judge.agreement(images, chosen)["group"] for name, images in sets.items()}
        apart = frechet(judge.features(sets["student"]), judge.features(sets["base"]))
        share = ratio(shifts["student"], shifts["base"]) if strength else ""
        lines.append(
            f"| {strength:g} | {float(shifts['base'].mean()):.4f} | {groups['base']:.3f} | "
            f"{float(shifts['student'].mean()):.4f} | {share} | {groups['student']:.3f} | {apart:.2f} |"
        )
        print(lines[-1], flush=True)
        if strength in (0.0, 1.0):
            shown += [sets["base"][::EACH], sets["student"][::EACH]]
    images, captions = captioned(args)
    real = [judge.agreement(x, captions)["group"] for x in (images, STYLES[args.style].paint(images))]
    write(args, trained, [*lines, "", f"Real tiles: group {real[0]:.3f}, restyled {real[1]:.3f}."], shown)


def write(args: argparse.Namespace, trained: float, lines: list[str], shown: list[Tensor]) -> None:
    about = (
        f"Style {args.style!r} on `{args.model}`: rank {args.rank}, {args.updates} updates of {args.batch} tiles, "
        f"{math.ceil(trained)} seconds of one core; base {args.teacher_steps} steps at guidance {args.guidance:g}, "
        f"{args.samples} pictures a row, seed {args.seed}; torch {torch.__version__}, {platform.machine()}."
    )
    if args.out:
        args.out.write_text("\n".join([about, "", *lines]) + "\n", "utf-8")
        grid(shown, args.out.with_suffix(".png"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--lora", type=Path, required=True, help="the distilled student")
    parser.add_argument("--file", type=Path, required=True, help="the base's LoRA: trained into it where it is absent")
    parser.add_argument("--data", type=Path, required=True, help="tiles with captions")
    parser.add_argument("--style", default="blue", choices=list(STYLES))
    parser.add_argument("--prompts", default="pipelines/tiny/prompts.txt")
    parser.add_argument("--tiles", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5])
    parser.add_argument("--teacher-steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
