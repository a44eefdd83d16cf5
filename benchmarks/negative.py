"""A negative word on a one-step student: how often its attribute still appears, and what that costs.

    python benchmarks/negative.py --model tiny --lora student.safetensors --reference tiles.npz --seeds 2000 \\
        --out benchmarks/results/negative-tiny.md --plot benchmarks/results/negative-tiny.png

Every setting draws the same pictures (same prompts, same noise) under a negative word: one of eight colours, bright or
dark, or the group that the student mistakes the prompt's for most often. rate: share of pictures in which the judge
sees that word. agreement: share in which it sees the prompt's group. FD-local: to real pictures. Limits are one-sided
95% bounds over pairs, on the side that could disprove a claim. CFG takes two forwards, all others one. SUN, the trained
counterpart, needs its adapter: --sun adapter.safetensors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onestep.cli.evaluate import judge_of, read_pictures, student_of
from onestep.cli.lora import read_lora
from onestep.cli.model import native_size, open_host, read_prompts
from onestep.core import randomness
from onestep.core.adapter_file import load_adapter
from onestep.core.cond import Cond
from onestep.core.guidance import Steering
from onestep.core.negative_adapter import MAKERS
from onestep.core.sampling import fed_latents
from onestep.pipelines.steer import steered
from onestep.training.measures import frechet

SCALES = {
    "nasa": (0.1, 0.2, 0.3, 0.4, 0.5, 0.7),
    "nag": (1.5, 2.0, 3.0, 4.0, 5.0, 7.0),
    "vsf": (0.25, 0.5, 1.0, 2.0, 3.5),
    "cfg": (1.25, 1.5, 2.0, 3.0),
    "sun": (1.0, 1.5, 2.0, 3.0),
}
SUBJECTS = ("colour", "brightness", "group")
ROLE = "student"
DRAWS = 400
BATCH = 64


@dataclass
class World:
    """One student with its judge. real: features [M, F] of real pictures."""

    host: Any
    student: Any
    judge: Any
    real: Tensor

    def told(self, texts: list[str]) -> Cond:
        """The conditions of ``texts``, each encoded once."""
        once = sorted(set(texts))
        place = {text: index for index, text in enumerate(once)}
        return self.host.encode(once, native_size(self.host))[torch.tensor([place[text] for text in texts])]

    @torch.no_grad()
    def draw(self, texts: list[str], negatives: list[str], mode: str, scale: float, stream: str) -> Tensor:
        """Pictures [N, 3, H, W] of ``texts``, each under its negative; mode "" is none."""
        cond, null = self.told(texts), self.told(negatives)
        shape = self.host.latent_shape(native_size(self.host))
        noise = randomness.normal(shape, 0, stream, 0, range(len(texts)))
        parts = [self._part(cond[rows], null[rows], noise[rows], mode, scale) for rows in slices(len(texts))]
        return torch.cat(parts)

    def _part(self, cond: Cond, null: Cond, noise: Tensor, mode: str, scale: float) -> Tensor:
        denoise, recipe = self.host.denoiser, self.student.recipe
        sigma = denoise.schedule.sigma_of_time(torch.tensor(recipe.told[:1], dtype=torch.float64)).expand(len(noise))
        x = fed_latents(denoise.schedule, noise, sigma, recipe.fed[0])
        on = steered(self.host.pipe, null.text, Steering(mode, scale)) if mode in ("nasa", "nag", "vsf") else None
        told = {"negative": null, "scale": scale} if mode == "sun" else {}
        with denoise.roles.use(ROLE, train=False, **told), on or nullcontext():
            x0 = denoise(x, sigma, cond)
            if mode == "cfg":
                away = denoise(x, sigma, null)
                x0 = away + scale * (x0 - away)
        return self.host.decode(x0)


def slices(count: int) -> Iterator[Tensor]:
    yield from torch.arange(count).split(BATCH)


@dataclass
class Seen:
    """What the judge sees in a setting's pictures. there: [N] the negative word. right: [N] the prompt's group."""

    there: Tensor
    right: Tensor
    features: Tensor


def seen(world: World, images: Tensor, subject: str, words: Tensor, groups: Tensor) -> Seen:
    chosen = {head: chances.argmax(1).cpu() for head, chances in world.judge.predict(images).items()}
    return Seen(chosen[subject] == words, chosen["group"] == groups, world.judge.features(images).cpu().double())


def row(name: str, here: Seen, plain: Seen, real: Tensor) -> dict[str, Any]:
    """Measures of a setting, with the one-sided bound of each claim by the bootstrap over pairs."""

    def measures(at: Tensor) -> tuple[float, float, float]:
        cut = float(here.there[at].double().mean()) / max(float(plain.there[at].double().mean()), 1e-9)
        loss = float(plain.right[at].double().mean() - here.right[at].double().mean())
        return cut, loss, frechet(here.features[at], real) / frechet(plain.features[at], real)

    count = len(here.there)
    generator = randomness.generator(0, "negative bootstrap")
    drawn = torch.tensor([measures(torch.randint(count, (count,), generator=generator)) for _ in range(DRAWS)])
    cut, loss, far = measures(torch.arange(count))
    upper = drawn.quantile(0.95, 0).tolist()
    return {
        "setting": name,
        "rate": float(here.there.double().mean()),
        "of plain": cut,
        "of plain, at most": upper[0],
        "agreement": float(here.right.double().mean()),
        "loss": loss,
        "loss, at most": upper[1],
        "FD-local": frechet(here.features, real),
        "FD of plain's": far,
        "FD of plain's, at most": upper[2],
    }


def asked(world: World, prompts: list[str], count: int, subject: str) -> tuple[list[str], list[str], Tensor, Tensor]:
    """(prompts, negative words, the words' classes [N], the prompts' groups [N]): the prompt names a group alone."""
    heads = world.judge.config["heads"]
    known = [
        group for group in (text.split(",")[0].split(":")[0].strip() for text in prompts) if group in heads["group"]
    ]
    texts = [known[int(i)] for i in randomness.integers(len(known), 0, f"negative {subject}", 0, range(count))]
    groups = torch.tensor([heads["group"].index(text) for text in texts])
    if subject == "group":
        words = rivals(world, texts, groups)
    else:
        words = torch.arange(count) % len(heads[subject])
        words = words if subject == "colour" else torch.tensor([named(heads[subject], i) for i in range(count)])
    return texts, [heads[subject][int(word)] for word in words], words, groups


def named(classes: list[str], index: int) -> int:
    """Bright and dark in turn, whatever else the judge tells apart."""
    return classes.index(("bright", "dark")[index % 2])


def rivals(world: World, texts: list[str], groups: Tensor) -> Tensor:
    """For each prompt the group that the student's pictures are most often taken for instead, on noise of their own."""
    images = world.draw(texts, texts, "", 0.0, "negative rivals")
    chosen = world.judge.predict(images)["group"].argmax(1).cpu()
    confusion = torch.zeros(2 * [len(world.judge.config["heads"]["group"])])
    confusion.index_put_((groups, chosen), torch.ones(len(groups)), accumulate=True)
    return confusion.fill_diagonal_(0).argmax(1)[groups]


def table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---|" * (len(names) - 1)]
    for entry in rows:
        lines.append("| " + " | ".join(v if isinstance(v, str) else f"{v:.3f}" for v in entry.values()) + " |")
    return lines


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """For each subject the rate left, against FD-local and against the loss of agreement; a line for each mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(5 * len(found), 8), squeeze=False)
    for column, (subject, rows) in enumerate(found.items()):
        for line, measure in enumerate(("FD of plain's", "loss")):
            axis = axes[line][column]
            for mode in SCALES:
                mine = [entry for entry in rows if entry["setting"].startswith(mode)]
                axis.plot([e["of plain"] for e in mine], [e[measure] for e in mine], marker="o", label=mode.upper())
                for entry in mine:
                    axis.annotate(entry["setting"].split()[1], (entry["of plain"], entry[measure]), fontsize=7)
            axis.axvline(0.5, color="grey", linewidth=0.5)
            axis.axhline((1.1, 0.02)[line], color="grey", linewidth=0.5)
            axis.set(title=f"negative {subject}", xlabel="rate of the word, of the plain student's", ylabel=measure)
            axis.set_ylim(*((0.5, 2.0), (-0.06, 0.2))[line])
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--lora", type=Path, required=True, help="a one-step student of the model")
    parser.add_argument("--prompts", default="pipelines/tiny/prompts.txt", help="whose groups are asked for, as often")
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=SUBJECTS)
    parser.add_argument("--modes", nargs="+", choices=list(SCALES), help="all by default; sun where there is --sun")
    parser.add_argument("--sun", type=Path, help="a negative adapter for this student")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if "sun" in (args.modes or ()) and not args.sun:
        parser.error("mode sun needs its adapter: --sun FILE")
    host = open_host(args.model, "all", "cpu")
    student, judge = student_of(read_lora(str(args.lora), host), host, ROLE), judge_of(args.model, None)
    state = {name: (a, b * student.recipe.lora_scale) for name, (a, b) in student.state.items()}
    host.denoiser.roles.load(ROLE, state)
    if args.sun:
        host.denoiser.roles.add_side(ROLE, load_adapter(args.sun, MAKERS, host.family).side.requires_grad_(False))
    args.modes = args.modes or [mode for mode in SCALES if mode != "sun" or args.sun]
    real = judge.features(read_pictures(args.reference)).double()
    world, prompts = World(host, student, judge, real), read_prompts(args.prompts)
    found = {subject: measured(world, prompts, args, subject) for subject in args.subjects}
    lines = [f"`{args.model}`, one step, {args.seeds} pairs, torch {torch.__version__}.", ""]
    for subject, rows in found.items():
        lines += [f"Negative {subject}:", "", *table(rows), ""]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines), "utf-8")
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    if args.plot:
        plot(found, args.plot)


def measured(world: World, prompts: list[str], args: argparse.Namespace, subject: str) -> list[dict[str, Any]]:
    """The rows of one subject: the plain student first."""
    texts, negatives, words, groups = asked(world, prompts, args.seeds, subject)

    def look(mode: str, scale: float) -> Seen:
        return seen(world, world.draw(texts, negatives, mode, scale, f"negative {subject}"), subject, words, groups)

    plain = look("", 0.0)
    rows = [row("plain", plain, plain, world.real)]
    for mode in args.modes:
        for scale in SCALES[mode]:
            rows.append(row(f"{mode} {scale:g}", look(mode, scale), plain, world.real))
            print(subject, json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()
