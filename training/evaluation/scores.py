"""What a row's pictures are worth: its distances, what it obeyed, its variety, each with an interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from .measures import Estimate, bootstrap, frechet, kernel_distance, obeyed, projected, sliced, variety

Measures = dict[str, Estimate]


class Judge(Protocol):
    """A frozen classifier of the model's pictures; `training.judge.Judge` is one."""

    def features(self, images: Tensor) -> Tensor:
        """[B, F] of [B, 3, H, W] in [0, 1]."""
        ...

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Probabilities [B, classes] by subject: group, colour, brightness."""
        ...

    def asked(self, prompts: list[str]) -> dict[str, Tensor]:
        """Classes [B] by subject that the prompts ask for, -1 where they ask for none."""
        ...


@dataclass(frozen=True)
class Seen:
    """What of a row's pictures is compared.

    flat: [N, directions] of their pixels. surface: [N, ...] where variety is measured: a judge's features, else pixels.
    chosen: classes [N] by subject. features: [N, F], None without a judge.
    """

    flat: Tensor
    surface: Tensor
    features: Tensor | None = None
    chosen: dict[str, Tensor] = field(default_factory=dict)


def look(images: Tensor, judge: Judge | None, seed: int) -> Seen:
    """Pictures [N, 3, H, W] in [0, 1] as they are compared."""
    flat = projected(images, seed)
    if judge is None:
        return Seen(flat, images)
    chosen = {subject: chances.argmax(1).cpu() for subject, chances in judge.predict(images).items()}
    features = judge.features(images).cpu().double()
    return Seen(flat, features, features, chosen)


@dataclass(frozen=True)
class Scores:
    """Measures over ``count`` prompts with ``each`` pictures in a row; asked: classes [N] by subject."""

    count: int
    each: int
    seed: int
    asked: dict[str, Tensor]

    def __call__(self, here: Seen, teacher: Seen, real: Seen | None) -> Measures:
        """All measures of a row. ``here is teacher`` has no distance to itself."""
        found = {} if here is teacher else self.distances(here, teacher, "")
        found |= {} if real is None else self.distances(here, real, "_real")
        found |= {subject: self.obeyed(here.chosen[subject], asked) for subject, asked in self.asked.items()}
        return found | {"variety": self.variety(here, teacher)}

    def distances(self, a: Seen, b: Seen, to: str) -> Measures:
        """To another row. Prompts are redrawn on both sides together: the teacher drew the same ones."""
        count = min(len(a.flat), len(b.flat)) // self.each

        def between(measure: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor) -> Estimate:
            found = bootstrap(lambda rows: measure(x[rows], y[rows]), count, self.each, self.seed)
            return replace(found, low=max(0.0, found.low))

        found = {f"sliced{to}": between(sliced, a.flat, b.flat)}
        if a.features is not None and b.features is not None:
            x, y = (side[: count * self.each] for side in (a.features, b.features))
            found[f"fd{to}"] = between(frechet, x, y)
            found[f"kd{to}"] = Estimate(kernel_distance(x, y), math.nan, math.nan)
        return found

    def obeyed(self, chosen: Tensor, asked: Tensor) -> Estimate:
        return bootstrap(lambda rows: obeyed(chosen[rows], asked[rows]), self.count, self.each, self.seed)

    def variety(self, here: Seen, teacher: Seen) -> Estimate:
        """Mean distance between the pictures of a prompt, as a share of the teacher's."""
        mine, theirs = variety(here.surface, self.each), variety(teacher.surface, self.each)
        if not float(theirs.sum()):
            return Estimate(math.nan, math.nan, math.nan)
        return bootstrap(lambda rows: float(mine[rows].sum() / theirs[rows].sum()), self.count, 1, self.seed)
