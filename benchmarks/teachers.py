"""How good the bundled teachers and the judge are, before any student is scored.

    python benchmarks/teachers.py --data tiles.npz [--models pipelines/tiny] [--out benchmarks/results]

Real tiles of the judge's groups are split into two halves A and B; every model draws the captions of A, and its
pictures are compared with the real tiles of B, as many. So the floor of FD-local is that between A and B themselves.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline, ZImagePipeline
from PIL import Image
from tiny_models import data
from torch import Tensor

from onestep.training.evaluation.judge import Judge
from onestep.training.evaluation.measures import frechet

ABSENT = {
    "StableDiffusionPipeline": {"safety_checker": None, "feature_extractor": None},
    "StableDiffusion3Pipeline": {"text_encoder_3": None, "tokenizer_3": None},
}
GRID = (6, 16)
BATCH = 128

Row = dict[str, Any]


def main() -> None:
    """Print the table, and write it and a grid of pictures to --out."""
    args = arguments()
    torch.set_num_threads(args.threads)
    judge = Judge.load(args.models / "judge")
    first, second, prompts = halves(data.load(args.data), judge, args)
    rows = [row("real tiles, other half", judge, first, prompts, second)]
    grids = [first]
    rows.append(row("autoencoder of `tiny`", judge, through_autoencoder(args.models / "tiny", first), prompts, second))
    for name in args.names:
        pipe = load(args.models / name)
        for steps in (args.steps, 1):
            began = time.monotonic()
            images = draw(pipe, prompts, steps, args.guidance, args.seed)
            seconds = time.monotonic() - began
            rows.append(row(f"`{name}`, {steps} step{'s' * (steps > 1)}", judge, images, prompts, second, seconds))
            grids.append(images)
    write(args, judge, rows, grids, len(first))


def halves(tiles: data.Tiles, judge: Judge, args: argparse.Namespace) -> tuple[Tensor, Tensor, list[str]]:
    """Two random halves of the tiles of the judge's groups, [n, 3, 32, 32] in [0, 1], and the prompts of the first."""
    known = torch.nonzero(judge.asked(list(tiles.captions))["group"] >= 0)[:, 0]
    known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(args.seed))]
    n = min(len(known) // 2, args.samples or len(known))
    first, second = known[:n], known[n : 2 * n]
    images = tiles.images.float() / 255.0
    prompts = [data.prompt(tiles.captions[at], tiles.words[at], True, args.words, args.words) for at in first]
    return images[first], images[second], prompts


def load(folder: Path) -> DiffusionPipeline:
    """A bundled model as its diffusers pipeline, quiet."""
    kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    pipe = DiffusionPipeline.from_pretrained(folder, **ABSENT.get(kind, {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw(pipe: DiffusionPipeline, prompts: list[str], steps: int, guidance: float, seed: int) -> Tensor:
    """Pictures [N, 3, 32, 32] in [0, 1], one per prompt."""
    generator, images = torch.Generator().manual_seed(seed), []
    # Zero tokens in place of T5's cost ten times the rest of the text and were trained to be optional.
    extra = {"max_sequence_length": 0} if isinstance(pipe, StableDiffusion3Pipeline) else {}
    guidance -= isinstance(pipe, ZImagePipeline)  # which counts from 0
    for at in range(0, len(prompts), BATCH):
        out = pipe(
            prompts[at : at + BATCH],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="pt",
            width=32,
            height=32,
            **extra,
        )
        images.append(out.images)
    return torch.cat(images).float().clamp(0, 1)


@torch.no_grad()
def through_autoencoder(folder: Path, images: Tensor) -> Tensor:
    """The pictures encoded and decoded: the best that any model in this latent space can do."""
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    parts = [vae.decode(vae.encode(2 * part - 1).latent_dist.mean).sample for part in images.split(256)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def row(name: str, judge: Judge, images: Tensor, prompts: list[str], real: Tensor, seconds: float = 0.0) -> Row:
    """One line of the table."""
    distance = frechet(judge.features(images), judge.features(real))
    return {"what": name, "fd_local": distance, "seconds": seconds, **judge.agreement(images, prompts)}


def write(args: argparse.Namespace, judge: Judge, rows: list[Row], grids: list[Tensor], samples: int) -> None:
    """Print the table; with --out, write it there with a grid of pictures."""
    table = markdown(judge, rows, samples, args)
    print(table)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        name = "teachers_words" if args.words else "teachers"
        (args.out / f"{name}.md").write_text(table, encoding="utf-8")
        save_grids(grids, args.out / f"{name}.png")


def markdown(judge: Judge, rows: list[Row], samples: int, args: argparse.Namespace) -> str:
    """The table with what it takes to make it again."""
    held, floor = judge.config["held_out"], rows[0]["fd_local"]
    options = f"--steps {args.steps} --guidance {args.guidance:g} --seed {args.seed} --samples {args.samples}"
    own = ", ".join(f"{head} {share:.3f}" for head, share in held.items())
    lines = [
        "# The bundled teachers", "",
        f"    python benchmarks/teachers.py --data tiles.npz {options}{' --words' * args.words}", "",
        f"{samples} pictures a row, guidance {args.guidance:g}. Agreement: share of the pictures in which the judge",
        f"sees what the prompt asks for. The judge's own accuracy on held-out caption stems: {own}.", "",
        "| pictures | group | of the judge's own | colour | brightness | FD-local to real | of the floor | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for each in rows:
        of_own = (f"{each['group'] / held['group']:.2f}x",)
        cells = (each["what"], _share(each["group"]), *of_own, _share(each["colour"]), _share(each["brightness"]))
        distance = f"{each['fd_local']:.2f} | {each['fd_local'] / floor:.2f}x"
        lines.append(f"| {' | '.join(cells)} | {distance} | {each['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def _share(value: float) -> str:
    return "not asked" if math.isnan(value) else f"{value:.3f}"


def save_grids(grids: list[Tensor], path: Path, scale: int = 2) -> None:
    """One block of GRID pictures per row of the table, above each other."""
    rows, columns = GRID
    blocks = [
        images[: rows * columns].unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        for images in grids
    ]
    pixels = (torch.cat(blocks) * 255).round().byte().numpy()
    Image.fromarray(np.repeat(np.repeat(pixels, scale, 0), scale, 1)).save(path)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=".npz with image [N, 32, 32, 3] and caption")
    parser.add_argument("--models", type=Path, default=Path(__file__).parents[1] / "pipelines" / "tiny")
    parser.add_argument("--names", nargs="+", default=("tiny", "tiny-flow", "tiny-dit"), help="folders below --models")
    parser.add_argument("--out", type=Path, help="folder for teachers.md and teachers.png")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--words", action="store_true", help="ask for each tile's own colour and brightness too")
    parser.add_argument("--samples", type=int, default=0, help="pictures a row; 0 = half of the tiles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
