"""Training of the judge on the real tiles, with whole caption stems held out."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from onestep.pipelines.tiny_words import BRIGHTNESS, COLOURS, group_of, stem_of
from onestep.training.evaluation.judge import Judge

from .data import Tiles
from .loop import Plan, Training

LEAST_TILES, HELD_OUT = 20, 5
FRAME = 2  # pixels by which a training tile is moved at most


def held_out(tiles: Tiles) -> Tensor:
    """Bool [N]: every fifth caption stem, by hash. Variants of one picture share a stem and so a side."""
    digests = [hashlib.sha256(stem_of(caption).encode()).hexdigest() for caption in tiles.captions]
    return torch.tensor([int(digest, 16) % HELD_OUT == 0 for digest in digests])


def groups(tiles: Tiles) -> list[str]:
    """Names of the groups with at least LEAST_TILES tiles, most frequent first."""
    counts = Counter(filter(None, map(group_of, tiles.captions)))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [group for group, count in ranked if count >= LEAST_TILES]


def labels(tiles: Tiles, names: dict[str, list[str]]) -> dict[str, Tensor]:
    """Head name -> class [N], -1 where the tile has none."""
    said = {
        "group": [group_of(caption) for caption in tiles.captions],
        "colour": [colour for colour, _ in tiles.words],
        "brightness": [brightness for _, brightness in tiles.words],
    }
    return {
        head: torch.tensor([names[head].index(word) if word in names[head] else -1 for word in words])
        for head, words in said.items()
    }


def train(tiles: Tiles, plan: Plan, folder: Path, batch: int = 96) -> Judge:
    """Train on the tiles that are not held out; the config takes the held-out accuracies of the rounded weights."""
    torch.manual_seed(plan.seed)
    names = {"group": groups(tiles), "colour": list(COLOURS), "brightness": list(BRIGHTNESS)}
    judge = Judge({"heads": names, "held_out": {}, "held_out_stems": f"1 in {HELD_OUT}"})
    images, classes, away = tiles.images.float() / 255.0, labels(tiles, names), held_out(tiles)
    seen = torch.nonzero(~away)[:, 0]
    # Tiles of small groups have no group label; common groups would drown the rest, so weigh by count^-1/2.
    counts = torch.bincount(classes["group"][seen].clamp_min(0), minlength=len(names["group"]))
    weight = counts.float().clamp_min(1).rsqrt()
    weight /= weight.mean()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = seen[torch.randint(len(seen), (batch,), generator=generator)]
        logits = judge.logits(judge.features(augmented(images[rows], generator)))
        error = nn.functional.cross_entropy
        group = error(logits["group"], classes["group"][rows], weight, ignore_index=-1, label_smoothing=0.1)
        words = [error(logits[head], classes[head][rows], ignore_index=-1) for head in ("colour", "brightness")]
        return group + 0.5 * words[0] + 0.5 * words[1]

    Training(judge, plan, folder).run(loss)
    judge.save(folder / "model")
    judge = Judge.load(folder / "model")
    judge.config["held_out"] = accuracy(judge, images[away], {head: of[away] for head, of in classes.items()})
    judge.config["seen"] = accuracy(judge, images[seen], {head: of[seen] for head, of in classes.items()})
    judge.save(folder / "model")
    return judge


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """images [B, 3, H, W] in [0, 1] moved by up to FRAME pixels, some blurred, some with noise. Never mirrored: a left
    hand and a right hand are two groups."""
    batch, _, height, width = images.shape
    padded = nn.functional.pad(images, (FRAME,) * 4, mode="replicate")
    dy, dx = torch.randint(2 * FRAME + 1, (2, batch, 1, 1), generator=generator)
    rows, columns = dy + torch.arange(height)[:, None], dx + torch.arange(width)
    moved = padded[torch.arange(batch)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
    # An autoencoder's pictures are softer than the tiles: the judge must not read softness as a class.
    blurred = nn.functional.avg_pool2d(nn.functional.pad(moved, (1,) * 4, mode="replicate"), 3, stride=1)
    share = torch.rand(batch, 1, 1, 1, generator=generator) * (torch.rand(batch, 1, 1, 1, generator=generator) < 0.5)
    noise = 0.04 * torch.rand(batch, 1, 1, 1, generator=generator) * torch.randn(moved.shape, generator=generator)
    return (torch.lerp(moved, blurred, share) + noise).clamp(0, 1)


def accuracy(judge: Judge, images: Tensor, classes: dict[str, Tensor]) -> dict[str, float]:
    """Head name -> share of the labelled tiles that the judge gets right."""
    chosen = {head: chances.argmax(dim=1) for head, chances in judge.predict(images).items()}
    return {head: round(float((chosen[head] == of)[of >= 0].float().mean()), 4) for head, of in classes.items()}
