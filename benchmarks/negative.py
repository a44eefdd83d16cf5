"""A negative word on a one-step student: how often its attribute still appears, and what that costs.

    python benchmarks/negative.py --model tiny --lora student.safetensors --reference tiles.npz --seeds 2000 \\
        --out benchmarks/results/negative-tiny.md --plot benchmarks/results/negative-tiny.png

Every setting draws the same pictures (same prompts, same noise) under a negative word: one of eight colours, bright or
dark, or the group that the student mistakes the prompt's for most often. rate: share of pictures in which the judge
sees that word. agreement: share in which it sees the prompt's group. FD-local: to real pictures. Limits are one-sided
95% bounds over pairs, on the side that could disprove a claim. CFG takes two forwards, all others one. SUN, the trained
counterpart, needs its adapter: --sun adapter.safetensors. --blend draws NAG and Perp at other alphas, --weights and
--keep are Perp's, --layers steers fewer layers, --padded and --prompts-pooled take the negative's text otherwise than
its mode's authors. --floor N adds what the teacher makes of the negative in N guided
steps, beside its own pictures without one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from negative_table import Seen, plot, row, seen, table
from torch import Tensor

from onestep.cli.evaluate import judge_of, read_pictures, student_of
from onestep.cli.lora import read_lora
from onestep.cli.model import open_host, read_prompts
from onestep.core import randomness
from onestep.core.adapter_file import load_adapter
from onestep.core.cond import Cond
from onestep.core.guidance import LAYERS, MODES, Steering
from onestep.core.negative_adapter import MAKERS
from onestep.core.roles import TEACHER
from onestep.core.sampling import initial_latents, trajectory
from onestep.pipelines.steer import steered

SCALES = {
    "nasa": (0.1, 0.2, 0.3, 0.4, 0.5, 0.7),
    "nag": (1.5, 2.0, 3.0, 4.0, 5.0, 7.0),
    "vsf": (0.25, 0.5, 1.0, 2.0, 3.5),
    "cfg": (1.25, 1.5, 2.0, 3.0),
    "sun": (1.0, 1.5, 2.0, 3.0),
    "perp": (10.0, 24.0),
}
SUBJECTS = ("colour", "brightness", "group")
ROLE = "student"
BATCH = 64
W = 3.0
"""The teacher's guidance."""


@dataclass(frozen=True)
class How:
    """One setting. mode: "" is the plain student. alpha, tau: NAG's and Perp's, None is the family's. steps: the
    teacher's. padded: None is as the mode's authors have it. pooled: whether the negative's own pooled text is used."""

    mode: str = ""
    scale: float = 0.0
    alpha: float | None = None
    steps: int = 0
    layers: str = "all"
    weight: float = Steering.weight
    keep: float = Steering.keep
    tau: float | None = None
    padded: bool | None = None
    pooled: bool = True

    @property
    def steering(self) -> Steering:
        own = {"layers": self.layers, "weight": self.weight, "keep": self.keep}
        return Steering(self.mode, self.scale, self.tau, self.alpha, **own)  # type: ignore[arg-type]

    @property
    def takes_padding(self) -> bool:
        usual = self.mode not in MODES or self.steering.wants_padding
        return usual if self.padded is None else self.padded

    @property
    def name(self) -> str:
        own = [f"weight {self.weight:g} keep {self.keep:g}"] if self.mode == "perp" else []
        own += [f"{name} {getattr(self, name):g}" for name in ("tau", "alpha") if getattr(self, name) is not None]
        own += [] if self.layers == "all" else [self.layers]
        own += [] if self.padded is None else ["padded" if self.padded else "unpadded"]
        own += [] if self.pooled else ["the prompt's pooled text"]
        return " ".join([f"{self.mode} {self.scale:g}", *own]) if self.mode else "plain"


@dataclass
class World:
    """One student with its judge. real: features [M, F] of real pictures."""

    host: Any
    student: Any
    judge: Any
    real: Tensor

    def told(self, texts: list[str], padded: bool = True) -> Cond:
        """The conditions of ``texts``, each encoded once."""
        once = sorted(set(texts))
        place = {text: index for index, text in enumerate(once)}
        return self.host.encode(once, self.host.native_size, padded)[torch.tensor([place[text] for text in texts])]

    @torch.no_grad()
    def draw(self, texts: list[str], negatives: list[str], how: How, stream: str) -> Tensor:
        """Pictures [N, 3, H, W] of ``texts``, each under its negative."""
        cond, null = self.told(texts), self.told(negatives, how.takes_padding)
        shape = self.host.latent_shape(self.host.native_size)
        noise = randomness.normal(shape, 0, stream, 0, range(len(texts)))
        part = self._walked if how.mode == "teacher" else self._part
        return torch.cat([part(cond[rows], null[rows], noise[rows], how) for rows in slices(len(texts))])

    @cached_property
    def empty(self) -> Cond:
        return self.told([""])

    def _walked(self, cond: Cond, null: Cond, noise: Tensor, how: How) -> Tensor:
        """The teacher's, by classifier-free guidance with the negative as its null, in ``how.steps`` steps."""
        with self.host.denoiser.roles.use(TEACHER):
            *_, (_, _, x0) = trajectory(self.host.denoiser, cond, null, noise, how.steps, how.scale)
        return self.host.decode(x0)

    def _part(self, cond: Cond, null: Cond, noise: Tensor, how: How) -> Tensor:
        mode, scale = how.mode, how.scale
        denoise, recipe = self.host.denoiser, self.student.recipe
        sigma = recipe.levels(denoise.schedule)[:1].expand(len(noise))
        x = initial_latents(denoise.schedule, noise, sigma, recipe.initial_noise_scale)
        away = replace(null, pooled=null.pooled if how.pooled else None)
        on = steered(self.host.pipe, away, how.steering, empty=self.empty) if mode in MODES else None
        told = {"negative": null, "scale": scale} if mode == "sun" else {}
        with denoise.roles.use(ROLE, train=False, **told), on or nullcontext():
            x0 = denoise(x, sigma, cond)
            if mode == "cfg":
                away = denoise(x, sigma, null)
                x0 = away + scale * (x0 - away)
        return self.host.decode(x0)


def slices(count: int) -> Iterator[Tensor]:
    yield from torch.arange(count).split(BATCH)


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
    images = world.draw(texts, texts, How(), "negative rivals")
    chosen = world.judge.predict(images)["group"].argmax(1).cpu()
    return mistaken(groups, chosen, len(world.judge.config["heads"]["group"]))[groups]


def mistaken(groups: Tensor, chosen: Tensor, classes: int) -> Tensor:
    """[classes] of each class the other that it was taken for most often: what was asked for [N], what was seen [N]."""
    confusion = torch.zeros(classes, classes)
    confusion.index_put_((groups, chosen), torch.ones(len(groups)), accumulate=True)
    # one that is never mistaken has another for a rival all the same, not itself
    return confusion.fill_diagonal_(-1).argmax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--lora", type=Path, required=True, help="a one-step student of the model")
    parser.add_argument("--prompts", default="pipelines/tiny/prompts.txt", help="whose groups are asked for, as often")
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=SUBJECTS)
    parser.add_argument("--modes", nargs="+", choices=list(SCALES), help="all by default; sun where there is --sun")
    parser.add_argument("--scales", nargs="+", type=float, help="instead of each mode's own")
    parser.add_argument("--blend", nargs="+", type=float, default=[None], help="alphas of NAG and Perp")
    parser.add_argument("--tau", type=float, help="of NAG and Perp")
    parser.add_argument(
        "--padded", choices=("yes", "no"), help="the negative; by default as the mode's authors have it"
    )
    parser.add_argument("--prompts-pooled", action="store_true", help="SD3, Flux: the prompt's pooled text for all")
    parser.add_argument("--weights", nargs="+", type=float, default=[Steering.weight], help="of Perp's negative")
    parser.add_argument("--keep", nargs="+", type=float, default=[Steering.keep], help="Perp's care for the prompt")
    parser.add_argument("--layers", default="all", choices=LAYERS, help="which are steered")
    parser.add_argument("--floor", type=int, default=0, help="the teacher's steps; 0 = without these rows")
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
        host.denoiser.roles.add_module(ROLE, load_adapter(args.sun, MAKERS, host.family).module.requires_grad_(False))
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
        plot(found, tuple(SCALES), args.plot)


def measured(world: World, prompts: list[str], args: argparse.Namespace, subject: str) -> list[dict[str, Any]]:
    """The rows of one subject: the plain student first."""
    texts, negatives, words, groups = asked(world, prompts, args.seeds, subject)

    def look(how: How, away: list[str]) -> Seen:
        return seen(world.judge, world.draw(texts, away, how, f"negative {subject}"), subject, words, groups)

    def tell(how: How, away: list[str], plain: Seen | None, name: str = "") -> Seen:
        here = look(how, away)
        rows.append(row(name or how.name, here, plain or here, world.real))
        print(subject, json.dumps(rows[-1]), flush=True)
        return here

    rows: list[dict[str, Any]] = []
    plain = tell(How(), negatives, None)
    for how in settings(args):
        tell(how, negatives, plain)
    if args.floor:
        teacher = How("teacher", W, steps=args.floor)
        alone = tell(teacher, [""] * len(texts), None, "teacher, no negative")
        tell(teacher, negatives, alone, "teacher, negative as null")
        if subject != "group":
            texts = [f"{text}, {word}" for text, word in zip(texts, others_of(world, subject, words), strict=True)]
            tell(teacher, [""] * len(texts), alone, "teacher, told another")
    return rows


def settings(args: argparse.Namespace) -> Iterator[How]:
    """What is asked for: each mode at its scales, or at --scales; NAG and Perp at each --blend, Perp at each of its
    own."""
    for mode in args.modes:
        blends = args.blend if mode in ("nag", "perp") else [None]
        weights, keep = (args.weights, args.keep) if mode == "perp" else ([Steering.weight], [Steering.keep])
        layers, tau = args.layers if mode in MODES else "all", args.tau if mode in ("nag", "perp") else None
        text = {"padded": {"yes": True, "no": False}.get(args.padded), "pooled": not args.prompts_pooled}
        for alpha, weight, kept in product(blends, weights, keep):
            for scale in args.scales or SCALES[mode]:
                yield How(mode, scale, alpha, layers=layers, weight=weight, keep=kept, tau=tau, **text)


def others_of(world: World, subject: str, words: Tensor) -> list[str]:
    """For each word the next one of its kind: what to ask for instead."""
    classes = world.judge.config["heads"][subject]
    if subject == "brightness":
        return ["dark" if classes[int(word)] == "bright" else "bright" for word in words]
    return [classes[(int(word) + 1) % len(classes)] for word in words]


if __name__ == "__main__":
    main()
