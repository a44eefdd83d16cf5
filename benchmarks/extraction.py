"""What a LoRA keeps of a few-step model that was trained whole, over its rank, plain and whitened.

    python benchmarks/extraction.py --updates 300 --out runs/extraction

All weights of `tiny`'s U-Net learn its teacher's pictures in one step (the regression of `onestep distill`, without
adapters); the two checkpoints' difference is then extracted at each rank.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tiny_models import store

from onestep.cli.model import open_host, read_prompts
from onestep.core import randomness
from onestep.core.extraction import weight_of
from onestep.core.recipe import Recipe
from onestep.core.roles import TEACHER
from onestep.core.sampling import initial_latents, teacher_sample
from onestep.pipelines.extract import Drawn, FewStep, extract_lora
from onestep.training.engine.inputs import automatic_start
from onestep.training.methods.regression import pseudo_huber

GUIDANCE, TEACHER_STEPS, C = 4.0, 20, 0.03


def recipe_of(host: Any) -> Recipe:
    """One step, as a student of this base begins it."""
    schedule = host.denoiser.schedule
    return Recipe.for_student(schedule, 1, host.family, (host.native_size,), automatic_start(schedule, 1))


def few_step(prompts: list[str], folder: Path, updates: int, batch: int, pairs: int, rate: float = 3e-4) -> Path:
    """`tiny` as a model of one step, all its weights trained; a diffusers folder."""
    if (folder / "model").is_dir():
        return folder / "model"
    host, parts = open_host("tiny", device="cpu"), []
    size, rows = host.native_size, randomness.integers(len(prompts), 0, "extraction prompts", 0, range(pairs))
    cond, null = host.encode([prompts[row] for row in rows.tolist()], size), host.encode([""], size)
    noise = randomness.normal(host.latent_shape(size), 0, "extraction noise", 0, range(pairs))
    denoise, network, recipe = host.denoiser, host.network, recipe_of(host)
    with torch.no_grad(), denoise.roles.use(TEACHER):
        for at in torch.arange(pairs).split(32):
            here = cond[at]
            drawn = teacher_sample(
                denoise, here, here.null_like(null), noise[at], TEACHER_STEPS, GUIDANCE, second_order=True
            )
            parts.append(drawn)
    targets = torch.cat(parts)
    optimizer = torch.optim.AdamW(network.requires_grad_(True).parameters(), lr=rate, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for update in range(updates):
        at = randomness.integers(pairs, 0, "extraction batch", update, range(batch))
        sigma = recipe.levels(denoise.schedule)[0].expand(batch)
        x = initial_latents(denoise.schedule, noise[at], sigma, recipe.initial_noise_scale)
        with denoise.roles.use(TEACHER):
            loss = pseudo_huber(denoise(x, sigma, cond[at]), targets[at], C).flatten(1).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        falling.step()
    store.save(host.pipe, folder / "model")
    return folder / "model"


def rows(few: Path, ranks: list[int], prompts: list[str], out: Path) -> Iterator[dict[str, Any]]:
    """What is kept, of each rank, plain and whitened by ``prompts``, and how far the pictures of these are apart."""
    base = open_host("tiny", device="cpu")
    new = FewStep(few, base.pipe)
    wanted = {name: new.weight(target) - weight_of(target) for name, target in base.denoiser.roles.targets.items()}
    for rank in ranks:
        for whitened in (False, True):
            host, file = open_host("tiny", device="cpu"), out / f"rank-{rank}.safetensors"
            found = extract_lora(host, few, file, rank, recipe_of(host), prompts if whitened else ())
            # of a plain extraction the pictures are not drawn: here they are, of the same prompts
            apart = found.apart if whitened else Drawn(host, recipe_of(host), prompts, None).apart(found.state, new)
            yield {
                "rank": rank,
                "whitened": whitened,
                "weights": found.whole.weights,
                "outputs": found.whole.outputs,
                "apart": apart,
                "largest error": max(error(found.state[name], wanted[name]) for name in found.state),
                "MiB": file.stat().st_size / 2**20,
            }


def error(factors: tuple[torch.Tensor, torch.Tensor], wanted: torch.Tensor) -> float:
    """max |B A - W| of a layer, over max |W|."""
    a, b = (factor.flatten(1) for factor in factors)
    return float((b @ a - wanted.flatten(1)).abs().max() / wanted.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default="pipelines/tiny/prompts.txt")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128, 1152])
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("runs/extraction"))
    args = parser.parse_args()
    prompts = read_prompts(args.prompts)
    args.out.mkdir(parents=True, exist_ok=True)
    few = few_step(prompts, args.out, args.updates, args.batch, args.pairs)
    for row in rows(few, args.ranks, prompts[::40][:8], args.out):
        print(json.dumps(row), flush=True)
        with (args.out / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
