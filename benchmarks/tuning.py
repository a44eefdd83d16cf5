"""Tuning a few-step student on 40 pictures of a new kind: what it learns, and what it loses.

    python benchmarks/tuning.py pictures --data tiles.npz --out runs/tuning          # the 40, with captions
    onestep distill tiny --method tune --prompts pipelines/tiny/prompts.txt --out runs/tuning/keep-1 \\
        --set pictures=runs/tuning/pictures --set initial_lora=student.safetensors --set keep=1 ...
    python benchmarks/tuning.py score --data tiles.npz --out tune-tiny.md student.safetensors \\
        runs/tuning/*/result.safetensors

The new kind is a blueprint: a tile's edges in white on blue, "blueprint demons: imp". The model has never seen one. Of
each LoRA 256 pictures of old prompts are judged beside real tiles, and 256 of blueprints, of tiles that are none of the
40, beside such tiles. A picture is of the new kind where a linear reading of the judge's features and of the picture's
means and deviations of colour, fitted to real tiles and their blueprints, says so.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from onestep.cli.evaluate import judge_of, student_of
from onestep.cli.lora import read_student
from onestep.cli.model import open_host, read_prompts
from onestep.pipelines.tiny_words import group_of, normalise
from onestep.training.evaluation import evaluate
from onestep.training.evaluation.measures import frechet

WORD, TUNED_ON, TESTED_ON, SIDE = "blueprint", 40, 300, (32, 32)
GROUPS = (
    *("altars", "animals", "armour", "base", "body", "demons", "hand1", "hand2", "head", "nonliving", "potion"),
    *("statues", "undead", "unique", "weapon"),
)
"""Of things with an outline."""
PAPER, INK = np.array([20, 50, 140]), np.array([235, 245, 255])


def blueprint(tile: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The edges of a tile [H, W, 3] in ink on paper, with a quarter of its own light."""
    grey = tile.astype(np.float64) @ [0.299, 0.587, 0.114] / 255
    found = Image.fromarray((grey * 255).astype(np.uint8)).filter(ImageFilter.FIND_EDGES)
    edges = np.asarray(found).astype(np.float64) / 255
    edges[[0, -1]], edges[:, [0, -1]] = 0, 0
    ink = np.clip(1.6 * edges + 0.25 * grey, 0, 1)[..., None]
    return ((1 - ink) * PAPER + ink * INK).astype(np.uint8)


def tiles_of(path: Path) -> tuple[NDArray[np.uint8], list[str], list[int]]:
    """(tiles, captions, which of them have an outline, in a fixed order)."""
    with np.load(path, allow_pickle=False) as file:
        tiles, captions = file["image"], [normalise(str(caption)) for caption in file["caption"]]
    fitting = [at for at, caption in enumerate(captions) if (group_of(caption) or "").split(" ")[0] in GROUPS]
    np.random.default_rng(0).shuffle(fitting)
    return tiles, captions, fitting


def write_pictures(data: Path, out: Path) -> None:
    tiles, captions, fitting = tiles_of(data)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    for at in fitting[:TUNED_ON]:
        Image.fromarray(blueprint(tiles[at])).save(out / "pictures" / f"{at}.png")
        (out / "pictures" / f"{at}.txt").write_text(f"{WORD} {captions[at]}", encoding="utf-8")


# -- what is measured -------------------------------------------------------------------------------------------------


class Kind:
    """Whether pictures are of the new kind."""

    def __init__(self, judge: Any, new: Tensor, old: Tensor) -> None:
        self.judge = judge
        x = torch.cat([self._seen(new), self._seen(old)])
        wanted = torch.cat([torch.ones(len(new)), torch.zeros(len(old))]).double()
        self.weights = torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(x.shape[1]).double(), x.T @ wanted)

    def __call__(self, pictures: Tensor) -> float:
        return float((self._seen(pictures) @ self.weights > 0.5).double().mean())

    def _seen(self, x: Tensor) -> Tensor:
        parts = [self.judge.features(x), 4 * x.mean((2, 3)), 4 * x.std((2, 3)), torch.ones(len(x), 1)]
        return torch.cat(parts, 1).double()


def sharpness(pictures: Tensor) -> float:
    """Mean difference of neighbouring pixels."""
    return float((pictures[..., 1:] - pictures[..., :-1]).abs().mean())


def as_pictures(tiles: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def drawn(host: Any, student: Any, prompts: list[str], count: int) -> tuple[list[str], Tensor]:
    plan = evaluate._plan(host, prompts, count, 0, SIDE, 32, lambda drawn: None)
    with host.denoiser.roles.installed():
        _, pictures = evaluate._student(plan, student)
    return plan.prompts, pictures


def score(args: argparse.Namespace) -> list[str]:
    host, judge = open_host(args.model), judge_of(args.model, None)
    tiles, captions, fitting = tiles_of(args.data)
    test = fitting[TUNED_ON : TUNED_ON + TESTED_ON]
    new, old = as_pictures(np.stack([blueprint(tiles[at]) for at in test])), as_pictures(tiles)
    kind, prompts = Kind(judge, new, old), read_prompts(args.prompts)
    order = torch.randperm(len(old), generator=torch.Generator().manual_seed(0))[: args.samples]
    lines = [
        "| LoRA | old: FD-local to real | old: group | old: colour | old: taken for new | new: of its kind | "
        "new: FD-local to the kind | new: sharpness |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in args.loras:
        student = student_of(read_student(path, host), host, path.stem)
        texts, kept = drawn(host, student, prompts, args.samples)
        _, learnt = drawn(host, student, [f"{WORD} {captions[at]}" for at in test], args.samples)
        agreed = judge.agreement(kept, texts)
        values = [
            *(frechet(judge.features(kept), judge.features(old[order])), agreed["group"], agreed["colour"], kind(kept)),
            *(kind(learnt), frechet(judge.features(learnt), judge.features(new)), sharpness(learnt)),
        ]
        name = path.parent.name if path.stem == "result" else path.stem
        shown = [f"{value:.1f}" if at in (0, 5) else f"{value:.3f}" for at, value in enumerate(values)]
        lines.append("| " + " | ".join([name, *shown]) + " |")
        print(lines[-1], flush=True)
        rows = torch.cat([torch.cat(list(side[:48:4]), 2) for side in (kept, learnt)], 1)
        picture = (rows.permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy()
        Image.fromarray(picture).resize((12 * 96, 2 * 96), 0).save(args.out.with_name(f"{args.out.stem}-{name}.png"))
    real = (
        f"Real blueprints: of their kind {kind(new):.3f}, sharpness {sharpness(new):.3f}; "
        f"real tiles taken for new {kind(old):.3f}."
    )
    return [*lines, "", real]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("pictures", "score"))
    parser.add_argument("loras", type=Path, nargs="*")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=Path, default=Path("pipelines/tiny/prompts.txt"))
    parser.add_argument("--samples", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.do == "pictures":
        write_pictures(args.data, args.out)
    else:
        args.out.write_text("\n".join(score(args)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
