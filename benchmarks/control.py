"""New controls for a frozen one-step generator, measured: do the controlled pictures have the edges that were asked
for, and are they as good as the uncontrolled ones?

    python benchmarks/control.py --model tiny --lora result.safetensors --prompts FILE --reference FILE.npz \\
        --samples 1000 --minutes 15 --runs runs/control --out benchmarks/results/control-tiny.md --set steps=600

Each control is that of another noise's picture for the same prompt, so the generator alone owes it nothing: its F1 is
that of strangers. A control of the noise's own picture is the other end: there the generator alone is perfect.

With --teacher-steps there is a baseline: an adapter of the same form on the teacher, trained by plain denoising on the
same pictures and controls, as many samples in batches of the same size, and drawn in that many guided steps.
--minutes are of processor time; --adapter and --baseline measure what is trained already.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from onestep.cli.evaluate import judge_of, read_pictures
from onestep.cli.lora import read_lora
from onestep.cli.model import at_native_size, open_host, read_prompts
from onestep.core import randomness
from onestep.core.adapter_file import load_adapter, save_adapter
from onestep.core.control import check_fit
from onestep.core.control_copy import MAKERS
from onestep.core.controls import control_of, edge_f1, visible
from onestep.core.sampling import sample, teacher_sample
from onestep.core.schedule import add_noise, log_snr
from onestep.training.data.controlled_pictures import TriplePool
from onestep.training.distil import Progress, distil
from onestep.training.engine.levels import UniformTime
from onestep.training.engine.prompts import embed
from onestep.training.engine.student import STUDENT
from onestep.training.engine.trainer import EMA, Trainer
from onestep.training.engine.turns import on_data, one_phase
from onestep.training.evaluation.measures import frechet
from onestep.training.methods import settings_for
from onestep.training.methods.nct import adapter as control_adapter
from onestep.training.methods.nct import generator_recipe
from onestep.training.settings import Settings

ROLE, BASELINE = "controlled", "baseline"
MICRO = 32
SHOWN = 12
Draw = Callable[[Tensor, Any], Tensor]


def settings_of(args: argparse.Namespace, host: Any) -> Settings:
    changes = dict(text.split("=", 1) for text in args.set)
    defaults = {"initial_lora": str(args.lora), "control": args.control, "learning_rate": "0.003"}
    return at_native_size(settings_for("nct").with_texts(defaults | changes), set(changes), host)


def train(args: argparse.Namespace, host: Any, prompts: list[str]) -> tuple[Path, str]:
    """The adapter's file, and a line on its training."""
    began = time.process_time()

    def report(progress: Progress) -> bool:
        if progress.update % 10 == 0:
            numbers = {name: round(value, 5) for name, value in progress.numbers.items()}
            print(progress.update, f"{time.process_time() - began:.0f} s of processor", numbers, flush=True)
        return time.process_time() - began > 60 * args.minutes

    result = distil(host, prompts, settings_of(args, host), args.runs, existing="continue", report=report)
    spent = (time.process_time() - began) / 60
    return result.path, f"{result.updates} updates with {json.dumps(args.set)}, {spent:.0f} minutes of one core"


# -- the baseline -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Denoising:
    """ControlNet's own loss (arXiv:2302.05543, Eq. 3) on the generator's pictures; a tenth without their prompts."""

    denoise: Any

    def __call__(self, batch: Any, data: Any) -> Tensor:
        denoise = self.denoise
        batch, schedule = batch.with_nulls(0.1, "no prompt"), denoise.schedule
        sigma = UniformTime()(schedule, batch.uniform("level"))
        noisy = add_noise(schedule, data.x, batch.normal("level noise"), sigma)
        with denoise.roles.use(STUDENT, control=data.control):
            x0 = denoise(noisy, sigma, batch.cond)
        # |eps - eps_theta|^2 = (alpha / sigma)^2 |x - D|^2
        weight = torch.exp(2 * log_snr(schedule, sigma)).to(x0)
        return (weight * (x0 - data.x).square().flatten(1).sum(1)).mean()  # type: ignore[no-any-return]


def train_baseline(args: argparse.Namespace, host: Any, prompts: list[str], updates: int) -> Path:
    """The baseline's file, of the pictures and controls that the adapter was trained on."""
    settings = replace(settings_of(args, host), initial_lora="", steps=updates)
    texts, roles = embed(host, prompts, settings, args.runs / "embeddings"), host.denoiser.roles
    roles.load(STUDENT, {}, host.device)
    roles.add_module(STUDENT, control_adapter(host, settings).to(host.device))
    roles.copy(STUDENT, EMA)
    pool = TriplePool(
        host, texts, settings, args.runs / "triples", control_of(settings.own.control), nothing_new, lambda update: 1
    )
    plan = one_phase(STUDENT, on_data(pool.draw, Denoising(host.denoiser)), settings)
    trainer = Trainer(host, settings, generator_recipe(host, settings), texts, plan)
    with host.training():
        for update in range(updates):
            numbers = trainer.step(update)
            if update % 20 == 0:
                print("baseline", update, {name: round(value, 5) for name, value in numbers.items()}, flush=True)
    save_adapter(args.runs / "baseline.safetensors", roles.modules[EMA], host.family)
    for role in (STUDENT, EMA):
        roles.drop(role)
    return args.runs / "baseline.safetensors"  # type: ignore[no-any-return]


def nothing_new(batch: Any, noise: Tensor) -> Tensor:
    raise SystemExit("the baseline learns from the adapter's own pictures: train that first, into the same --runs")


@torch.no_grad()
def guided_pictures(args: argparse.Namespace, host: Any, prompts: list[str], noise: Tensor, control: Tensor) -> Tensor:
    """The baseline's [N, 3, H, W]: the teacher's guided steps under the control, in both of guidance's halves."""
    found, size = [], host.native_size
    for rows in torch.arange(len(noise)).split(MICRO):
        cond = host.encode([prompts[row] for row in rows.tolist()], size)
        null = cond.null_like(host.encode([""], size))
        with host.denoiser.roles.use(BASELINE, control=control[rows]):
            x = teacher_sample(host.denoiser, cond, null, noise[rows], args.teacher_steps, args.guidance)
        found.append(host.decode(x))
    return torch.cat(found)


# -- the table --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pictures(host: Any, recipe: Any, prompts: list[str], noise: Tensor, control: Tensor | None, strength: float) -> Any:
    """[N, 3, H, W] in [0, 1] of ROLE, in slices."""
    found, size = [], host.native_size
    for rows in torch.arange(len(noise)).split(MICRO):
        cond = host.encode([prompts[row] for row in rows.tolist()], size)
        told = None if control is None else control[rows]
        with host.denoiser.roles.use(ROLE, control=told, strength=strength):
            x = sample(host.denoiser, recipe, cond, noise[rows], torch.empty)  # one step draws no more noise
        found.append(host.decode(x))
    return torch.cat(found)


def row(name: str, images: Tensor, asked: Tensor, control: Any, real: Tensor | None, judge: Any, prompts: Any) -> str:
    """A line of the table: F1 with its 95% interval, at a reach of 1 pixel and of 0; FD-local; agreement."""
    cells = []
    for reach in (1, 0):
        f1 = edge_f1(control(images).round(), asked.round(), reach)
        cells.append(f"{float(f1.mean()):.3f} ± {1.96 * float(f1.std()) / math.sqrt(len(f1)):.3f}")
    if judge is not None and real is not None:
        cells.append(f"{frechet(judge.features(images), judge.features(real)):.2f}")
    if judge is not None:
        cells.append(f"{judge.agreement(images, prompts)['group']:.3f}")
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    args = arguments()
    host, prompts = open_host(args.model, device="cpu"), read_prompts(args.prompts)
    lora = read_lora(str(args.lora), host)
    path, said = (args.adapter, "trained before") if args.adapter else train(args, host, prompts)
    baseline = args.baseline
    if baseline is None and args.teacher_steps:
        baseline = train_baseline(args, host, prompts, args.baseline_updates)
    loaded = load_adapter(path, MAKERS, host.family)
    roles = host.denoiser.roles
    check_fit(loaded.module, roles.targets)
    roles.install()
    roles.load(ROLE, lora.state)
    roles.add_module(ROLE, loaded.module)
    if baseline is not None:
        roles.add_module(BASELINE, load_adapter(baseline, MAKERS, host.family).module)
    control, judge = control_of(loaded.module.config.control), judge_of(args.model, None)
    real = None if args.reference is None else read_pictures(args.reference)
    texts = [prompts[at % len(prompts)] for at in range(args.samples)]
    shape = host.latent_shape(host.native_size)
    noise, other = (randomness.normal(shape, args.seed, kind, 0, range(args.samples)) for kind in ("mine", "other"))

    def drawn(z: Tensor, c: Tensor | None, strength: float = 1.0) -> Tensor:
        return pictures(host, lora.recipe, texts, z, c, strength)  # type: ignore[no-any-return]

    source = drawn(other, None)
    asked = control(source)
    sets = {"uncontrolled": drawn(noise, None), "controlled": drawn(noise, asked)}
    sets |= {f"controlled, strength {s:g}": drawn(noise, asked, s) for s in args.strengths}
    sets |= {"controlled, from the control's own noise": drawn(other, asked), "the pictures asked for": source}
    if baseline is not None:
        name = f"multi-step ControlNet, {args.teacher_steps} guided steps"
        sets[name] = guided_pictures(args, host, texts, noise, asked)
    lines = [row(name, images, asked, control, real, judge, texts) for name, images in sets.items()]
    write(args, loaded.module, said, lines)
    if args.out:
        beside = [name for name in sets if name.startswith("multi-step")]
        shown = [source, visible(asked), *(sets[name] for name in ("uncontrolled", "controlled", *beside))]
        grid(shown, args.out.with_suffix(".png"))


def write(args: argparse.Namespace, side: Any, said: str, lines: list[str]) -> None:
    config = side.config
    size = sum(value.numel() for value in side.parameters())
    told = [
        f"# A control for one step: {config.control} on `{Path(args.model).name}`",
        "",
        f"Method nct, {said}. The adapter has {size / 1e6:.2f} million parameters at {len(config.places)} places. "
        f"{args.samples} pictures a row, seed {args.seed}; torch {torch.__version__}, {platform.machine()}.",
        "",
        "| pictures | F1, reach 1 | F1, reach 0 | FD-local to real | agreement |",
        "|---|---|---|---|---|",
        *lines,
    ]
    print("\n".join(told))
    if args.out:
        args.out.write_text("\n".join(told) + "\n", "utf-8")


def grid(rows: list[Tensor], path: Path, scale: int = 3) -> None:
    """One row of pictures above the other."""
    joined = torch.cat([torch.cat(list(images[:SHOWN]), 2) for images in rows], 1).clamp(0, 1)
    pixels = (255 * joined).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).resize((scale * pixels.shape[1], scale * pixels.shape[0]), Image.Resampling.NEAREST).save(
        path
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--lora", type=Path, required=True, help="the one-step LoRA: with the model, the generator")
    parser.add_argument("--adapter", type=Path, help="a control adapter that is trained already")
    parser.add_argument("--control", default="canny")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.5, 1.5])
    parser.add_argument("--teacher-steps", type=int, default=0, help="the baseline's; 0 = no baseline")
    parser.add_argument("--guidance", type=float, default=3.0, help="the baseline's")
    parser.add_argument("--baseline", type=Path, help="a baseline that is trained already")
    parser.add_argument("--baseline-updates", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the settings")
    parser.add_argument("--runs", type=Path, default=Path("runs/control"))
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
