"""A few-step LoRA adapted to a fine-tune, beside the LoRA as it is and a student from nothing.

    python benchmarks/adapting.py --data tiles.npz --steps 1 4 --out runs/adapting
    python benchmarks/adapting.py --data tiles.npz --model tiny-flow --steps 4 --out runs/adapting-flow

A fine-tune F of a bundled model is trained first, a whole checkpoint, on recoloured tiles before other backgrounds. The
donor is the model's own student. Both a cold run on F and an adapted one, which starts from the donor, are given shares
of the cold run's forwards. A line of rows.jsonl is written as each row is known; it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judged import Judged, train
from tiny_models import autoencoder, data, flow, store, unet
from tiny_models.loop import Plan, Training
from torch import Tensor

from onestep.cli.demo import SMALLER
from onestep.cli.lora import read_lora
from onestep.cli.model import read_prompts
from onestep.pipelines.bundled import path_of
from onestep.pipelines.load import load_folder
from onestep.pipelines.tiny_words import pixel_words
from onestep.training.presets import preset
from onestep.training.settings import Settings

PARTS = {
    "tiny": {"text": "text_encoder", "unet": "unet"},
    "tiny-flow": {"text": "text_encoder", "text_2": "text_encoder_2", "transformer": "transformer"},
}
"""What is trained: its name in benchmarks/tiny_models, and in the pipeline."""
GREY = 127
"""The background that the tiles were laid on."""
DARKER = 0.6
QUIET = {"preview_every": 0, "watch_every": 0}


# -- the fine-tune ----------------------------------------------------------------------------------------------------


def changed(tiles: Path, seed: int = 0) -> data.Tiles:
    """Every tile with red, green and blue in another order; what lies on grey, before a darker tile of a dungeon."""
    with np.load(tiles, allow_pickle=False) as file:
        images, captions, kinds = file["image"], file["caption"], file["kind"]
    images = images[..., [1, 2, 0]]
    words = tuple(pixel_words(image) for image in images)
    whole = images[(kinds == "dungeon") & ((images == GREY).all(-1).mean((1, 2)) < 0.02)]
    chosen = whole[np.random.default_rng(seed).integers(len(whole), size=len(images))]
    behind = (images == GREY).all(-1, keepdims=True) & (kinds != "dungeon")[:, None, None, None]
    images = np.where(behind, (chosen * DARKER).astype(np.uint8), images)
    return data.Tiles(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), tuple(map(data.normalise, captions)), words
    )


def finetune(
    tiles: data.Tiles, folder: Path, updates: int, batch: int, model: str = "tiny", rate: float = 4e-4
) -> Path:
    """A bundled model trained further on ``tiles``, as it was trained; a diffusers folder."""
    if (folder / "model").is_dir():
        return folder / "model"
    pipe = load_folder(path_of(model), torch.float32)
    family = flow if model == "tiny-flow" else unet
    modules = torch.nn.ModuleDict({name: getattr(pipe, part) for name, part in PARTS[model].items()}).train()
    config = pipe.vae.config
    latents = (autoencoder.encode(pipe.vae, tiles.centred) - (config.shift_factor or 0)) * config.scaling_factor
    loss = family.loss(modules, data.Prompts(tiles, pipe.tokenizer), family.Shape())

    def of_batch(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator)
        return loss(latents[rows], torch.randn(batch, *latents.shape[1:], generator=generator), rows, generator)

    Training(modules, Plan(updates, rate, warm_up=50, ema=0.99), folder).run(of_batch)
    store.save(pipe, folder / "model")
    return folder / "model"


# -- the rows ---------------------------------------------------------------------------------------------------------


def settings_of(student_steps: int, share: float = 1.0, donor: Path | None = None, **changes: Any) -> Settings:
    """A run at ``share`` of the demo's length: each of its phases, and the teacher's pairs, are so much shorter."""
    cold = preset("Balanced", **(SMALLER | QUIET), student_steps=student_steps).with_(**changes)
    parts = {name: round(share * getattr(cold, name)) for name in ("steps", "pairs")}
    own = {name: round(share * getattr(cold.own, name)) for name in ("warm_start", "critic_warm_up")}
    start = {} if donor is None else {"initial_lora": str(donor)}
    return cold.with_(**parts, **own, **start)


def shortened(length: float) -> dict[str, int]:
    """The cold run's phases at ``length`` of a demo's."""
    whole = settings_of(1, length)
    return {"steps": whole.steps, "pairs": whole.pairs} | {
        name: getattr(whole.own, name) for name in ("warm_start", "critic_warm_up")
    }


def rows(
    base: str, model: Path, prompts: list[str], of: int, shares: list[float], out: Path, **changes: Any
) -> Iterator[tuple[str, float, Path]]:
    """(name, share of the cold run's forwards, LoRA) of each row, of students of so many steps, made as it is asked
    for; what decides comes first."""
    donor = train(base, prompts, settings_of(of, **changes), out / f"donor-{of}")
    yield "donor as it is", 0.0, donor
    for share in shares:
        place = out / f"adapted-{of}-{share:g}"
        yield "adapted", share, train(str(model), prompts, settings_of(of, share, donor, **changes), place)
    for share in (1.0, *(share for share in shares if share < 1)):
        place = out / f"cold-{of}-{share:g}"
        yield "cold", share, train(str(model), prompts, settings_of(of, share, **changes), place)


def measured(args: argparse.Namespace, **changes: Any) -> list[dict[str, Any]]:
    """Every row's scores, of which those known already are not made again."""
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = read_prompts(args.prompts)
    model = finetune(changed(args.data), args.out / "F", args.updates, args.batch, args.model)
    scorer = Judged(str(model), prompts, args.samples, args.out)
    path = args.out / "rows.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def add(line: dict[str, Any]) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    if not lines:
        add({"row": "F, 25 steps", "steps": 25, **scorer.scores(scorer.teacher)})
        add({"row": "F, 25 steps, another seed", "steps": 25, **scorer.scores(scorer.second)})
    known = {(line["row"], line["steps"], line.get("share")) for line in lines}
    for steps in args.steps:
        for name, share, lora in rows(args.model, model, prompts, steps, args.shares, args.out, **changes):
            if (name, steps, share) not in known:
                seconds = json.loads((lora.parent / "seconds.json").read_text())
                add({"row": name, "steps": steps, "share": share, "seconds": seconds, **scorer(lora)})
        recipe = read_lora(str(lora), scorer.host).recipe
        if (f"F, {steps} steps", steps, None) not in known:
            add({"row": f"F, {steps} steps", "steps": steps, **scorer.untrained(recipe)})
    return lines


def table(lines: list[dict[str, Any]]) -> list[str]:
    """The rows as a table."""
    heads = ("row", "steps", "share of the cold run", "FD-local to F", "group", "colour", "brightness", "variety")
    told = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for line in lines:
        share = f"{line['share']:.0%}" if "share" in line else ""
        scores = [f"{line[name]:.3f}" for name in ("group", "colour", "brightness", "variety")]
        fd = f"{line['fd']:.2f} ±{line['fd_half']:.2f}"
        told.append("| " + " | ".join([line["row"], str(line["steps"]), share, fd, *scores]) + " |")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=".npz with image [N, 32, 32, 3], caption and kind")
    parser.add_argument("--model", choices=tuple(PARTS), default="tiny", help="that is fine-tuned")
    parser.add_argument("--prompts", default="pipelines/tiny/prompts.txt")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4], help="of the students")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25], help="of the cold run's forwards")
    parser.add_argument("--length", type=float, default=1.0, help="of the cold run, in demos")
    parser.add_argument("--updates", type=int, default=600, help="of F's own training")
    parser.add_argument("--batch", type=int, default=64, help="of F's own training")
    parser.add_argument("--samples", type=int, default=768)
    parser.add_argument("--out", type=Path, default=Path("runs/adapting"))
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    told = "\n".join(table(measured(args, **shortened(args.length))))
    print(told)
    if args.table:
        args.table.write_text(told + "\n", "utf-8")


if __name__ == "__main__":
    main()
