"""How good the bundled teachers and the judge are, before any student is scored.

    python benchmarks/teachers.py --data tiles.npz [--models pipelines/tiny] [--out benchmarks/results]

Real tiles of the judge's groups are split into two halves A and B; every model draws the captions of A, and its
pictures are compared with the real tiles of B, as many. So the floor of FD-local is that between A and B themselves.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from tiny_models import data
from torch import Tensor

from onestep.training.judge import Judge
from onestep.training.measures import frechet

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
    first, second, prompts = halves(data.load(args.data), judge, args.seed, args.samples)
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


def halves(tiles: data.Tiles, judge: Judge, seed: int, samples: int) -> tuple[Tensor, Tensor, list[str]]:
    """Two random halves of the tiles of the judge's groups, [n, 3, 32, 32] in [0, 1], and the captions of the first."""
    known = torch.nonzero(judge.asked(list(tiles.captions))["group"] >= 0)[:, 0]
    known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))]
    n = min(len(known) // 2, samples or len(known))
    first, second = known[:n], known[n : 2 * n]
    images = tiles.images.float() / 255.0
    return images[first], images[second], [tiles.captions[at] for at in first]


def load(folder: Path) -> DiffusionPipeline:
    """A bundled model as its diffusers pipeline, quiet."""
    kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    pipe = DiffusionPipeline.from_pretrained(folder, **ABSENT[kind])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw(pipe: DiffusionPipeline, prompts: list[str], steps: int, guidance: float, seed: int) -> Tensor:
    """Pictures [N, 3, 32, 32] in [0, 1], one per prompt."""
    generator, images = torch.Generator().manual_seed(seed), []
    # Zero tokens in place of T5's cost ten times the rest of the text and were trained to be optional.
    extra = {"max_sequence_length": 0} if hasattr(pipe, "transformer") else {}
    for at in range(0, len(prompts), BATCH):
        out = pipe(
            prompts[at : at + BATCH],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="pt",
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
    """Print the table; with --out, write teachers.md and teachers.png there."""
    table = markdown(judge, rows, samples, args)
    print(table)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "teachers.md").write_text(table, encoding="utf-8")
        save_grids(grids, args.out / "teachers.png")


def markdown(judge: Judge, rows: list[Row], samples: int, args: argparse.Namespace) -> str:
    """The table with what it takes to make it again."""
    held, floor = judge.config["held_out"], rows[0]["fd_local"]
    lines = [
        "# The bundled teachers", "",
        "    python benchmarks/teachers.py --data tiles.npz"
        f" --steps {args.steps} --guidance {args.guidance:g} --seed {args.seed} --samples {args.samples}", "",
        f"{samples} pictures a row; guidance {args.guidance:g}. The judge on held-out caption stems: "
        f"group {held['group']:.3f}, colour {held['colour']:.3f}, brightness {held['brightness']:.3f}.", "",
        "| pictures | group agreement | of the judge's own | FD-local to real | of the floor | seconds |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for each in rows:
        group, distance = each["group"], each["fd_local"]
        cells = (each["what"], f"{group:.3f}", f"{group / held['group']:.2f}x", f"{distance:.2f}")
        lines.append(f"| {' | '.join(cells)} | {distance / floor:.2f}x | {each['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--names", nargs="+", default=("tiny", "tiny-flow"), help="folders below --models")
    parser.add_argument("--out", type=Path, help="folder for teachers.md and teachers.png")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--samples", type=int, default=0, help="pictures a row; 0 = half of the tiles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
