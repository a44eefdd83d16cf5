"""The table of benchmarks/measure.py: rank correlations with the judge."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Line = dict[str, Any]
Read = Callable[[Line, str], float]
"""(a state's line, a set's name) -> what a measure says of the state; less is better."""


def ranks(values: Tensor) -> Tensor:
    """[N] from 0; equal values share their mean rank."""
    less = (values[:, None] > values[None]).double().sum(1)
    equal = (values[:, None] == values[None]).double().sum(1)
    return less + (equal - 1) / 2


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation: Pearson's of the ranks."""
    both = torch.stack([ranks(torch.tensor(side, dtype=torch.float64)) for side in (a, b)])
    return float(torch.corrcoef(both)[0, 1])


def read_lines(folder: Path) -> list[Line]:
    return [json.loads(line) for line in (folder / "score.jsonl").read_text().splitlines()]


def judged(lines: list[Line], key: str, at: int | None = None) -> list[float]:
    """The judge's word on each state: of one of its two sets, or their mean."""
    sets = range(2) if at is None else [at]
    return [statistics.mean(line[f"judge {one}"][key] for one in sets) for line in lines]


def near_best(lines: list[Line], key: str, times: float = 2.0) -> list[Line]:
    """The states within ``times`` of the best."""
    values = judged(lines, key)
    return [line for line, value in zip(lines, values, strict=True) if value <= times * min(values)]


def measures(lines: list[Line]) -> dict[str, Read]:
    """Today's, the denoising errors, and each distance, its mean over blocks: by level and part, and over all."""
    names = list(lines[0]["watch 0"])
    found: dict[str, Read] = {}
    for name in names:
        if name.startswith("today: variety") or name.startswith("today: spread"):
            found[f"today: {name[7:]}, from 1"] = lambda line, kept, name=name: abs(1 - line[kept][name])
        elif "#" not in name:
            found[name] = lambda line, kept, name=name: line[kept][name]
    found["today: distance + content"] = lambda line, kept: sum(
        line[kept][f"today: {one}"] for one in ("distance", "content")
    )
    groups: dict[str, list[str]] = {}
    for name in (name for name in names if "#" in name):
        whole = name.split(" #")[0]
        distance, rest = whole.split(" of ")
        part, level = rest.split(" @")
        for group in (whole, f"{distance} of {part}", f"{distance} @{level}", f"{distance}, all"):
            groups.setdefault(group, []).append(name)
    for group, members in groups.items():
        found[group] = lambda line, kept, members=members: statistics.mean(line[kept][one] for one in members)
    return found


def correlations(lines: list[Line], key: str) -> tuple[float, list[tuple[str, float, float, float]]]:
    """The judge's own from one set to the other; of each measure, of either of its sets and of their mean, the best
    first."""
    own = spearman(judged(lines, key, 0), judged(lines, key, 1))
    whole, rows = judged(lines, key), []
    for name, read in measures(lines).items():
        values = [[read(line, f"watch {at}") for line in lines] for at in range(2)]
        together = [statistics.mean(pair) for pair in zip(*values, strict=True)]
        rows.append((name, *(spearman(side, whole) for side in values), spearman(together, whole)))
    return own, sorted(rows, key=lambda row: -(row[1] + row[2]))


def table(folders: list[Path], out: Path | None, times: float = 2.0, most: int = 20) -> None:
    """Write, or print, the correlations of each folder's states within ``times`` of its best."""
    told: list[str] = []
    for folder in folders:
        lines = read_lines(folder)
        for key, word in (("fd", "the teacher's pictures"), ("fd_real", "real pictures")):
            if key in lines[0]["judge 0"]:
                told += section(folder.name, lines, key, word, times, most)
    if out is None:
        print("\n".join(told))
    else:
        out.write_text("\n".join(told) + "\n", "utf-8")


def section(name: str, lines: list[Line], key: str, word: str, times: float, most: int) -> list[str]:
    kept = near_best(lines, key, times)
    values = judged(lines, key)
    if len(kept) < 4:
        return [
            f"{name}, FD-local to {word}: {len(kept)} of {len(lines)} states within {times:g}x of the best: too few",
            "",
        ]
    own, rows = correlations(kept, key)
    _, everywhere = correlations(lines, key)
    over_all = {row[0]: row[3] for row in everywhere}
    shown = rows[:most] + [row for row in rows[most:] if row[0].startswith(("today", "latents", "denoising"))]
    return [
        f"## {name}, FD-local to {word}",
        "",
        f"{len(lines)} states, FD-local {min(values):.2f} to {max(values):.2f}; {len(kept)} of them within "
        f"{times:g}x of the best. The judge's own rank correlation from one set of prompts and noises to the other, "
        f"over these: {own:.2f}; over all {spearman(judged(lines, key, 0), judged(lines, key, 1)):.2f}.",
        "",
        "| measure | one set of 64 | another | both, 128 | both, all states |",
        "|---|---|---|---|---|",
        *(f"| {row[0]} | {row[1]:.2f} | {row[2]:.2f} | {row[3]:.2f} | {over_all[row[0]]:.2f} |" for row in shown),
        "",
    ]
