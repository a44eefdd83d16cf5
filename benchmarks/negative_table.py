"""What the judge sees in the pictures of benchmarks/negative.py, as rows, a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onestep.core import randomness
from onestep.training.evaluation.measures import frechet

DRAWS = 400


@dataclass
class Seen:
    """What the judge sees in a setting's pictures. there: [N] the negative word. right: [N] the prompt's group."""

    there: Tensor
    right: Tensor
    features: Tensor


def seen(judge: Any, images: Tensor, subject: str, words: Tensor, groups: Tensor) -> Seen:
    chosen = {head: chances.argmax(1).cpu() for head, chances in judge.predict(images).items()}
    return Seen(chosen[subject] == words, chosen["group"] == groups, judge.features(images).cpu().double())


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


def table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---|" * (len(names) - 1)]
    for entry in rows:
        lines.append("| " + " | ".join(v if isinstance(v, str) else f"{v:.3f}" for v in entry.values()) + " |")
    return lines


def line_of(entry: dict[str, Any]) -> str:
    """What a setting is but for its scale: "NAG", or "NAG alpha 0.35 decoder"."""
    mode, *rest = entry["setting"].split(maxsplit=2)
    return " ".join([mode.upper(), *rest[1:]])


def plot(found: dict[str, list[dict[str, Any]]], modes: Sequence[str], path: Path) -> None:
    """For each subject the rate left, against FD-local and against the loss of agreement; a line for each mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(5 * len(found), 8), squeeze=False)
    for column, (subject, rows) in enumerate(found.items()):
        for line, measure in enumerate(("FD of plain's", "loss")):
            axis = axes[line][column]
            for name in sorted({line_of(entry) for entry in rows if entry["setting"].split()[0] in modes}):
                mine = [entry for entry in rows if line_of(entry) == name]
                told = {"marker": "o", "label": name, "color": f"C{modes.index(name.split()[0].lower())}"}
                axis.plot([e["of plain"] for e in mine], [e[measure] for e in mine], **told)
                for entry in mine:
                    axis.annotate(entry["setting"].split()[1], (entry["of plain"], entry[measure]), fontsize=7)
            axis.axvline(0.5, color="grey", linewidth=0.5)
            axis.axhline((1.1, 0.02)[line], color="grey", linewidth=0.5)
            axis.set(title=f"negative {subject}", xlabel="rate of the word, of the plain student's", ylabel=measure)
            axis.set_ylim(*((0.5, 2.0), (-0.06, 0.2))[line])
            axis.legend(fontsize=7, framealpha=0.6)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
