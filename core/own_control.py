"""A control of one's own that is known by examples: pictures, and what any tool has made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .control import fitted
from .controls import CONTROLS, Control, register
from .errors import OneStepError

SIDE = 16
NEAR = 1 / 255
"""Two pictures whose means over a grid of 16 x 16 cells are less than this apart (rms) are the same."""


def register_examples(name: str, pictures: Tensor, controls: Tensor) -> str:
    """Make the controls [N, C, H', W'] of ``pictures`` [N, 3, H, W], both in [0, 1], known as a control of nct; the
    name to ask for it by, which tells this set of examples from any other.

    Such a control exists for these pictures alone: they must be those of the run, as `training.generator_pictures`
    draws them. Raises OneStepError for examples that are none.
    """
    _check(pictures, controls)
    kept = (255 * fitted(controls.float(), (pictures.shape[3], pictures.shape[2]))).round().to(torch.uint8).cpu()
    seen = signature(pictures.float().cpu())
    digest = hashlib.sha256(seen.numpy().tobytes() + kept.contiguous().numpy().tobytes()).hexdigest()[:8]
    known = f"{name}-{digest}"
    if known not in CONTROLS:
        register(known, Control(name, kept.shape[1], Examples(name, seen, kept)))
    return known


class Examples:
    """The extractor: the control of the example that a picture is. seen: their signatures. kept: [N, C, H, W] uint8."""

    def __init__(self, name: str, seen: Tensor, kept: Tensor) -> None:
        self.name, self.seen, self.kept = name, seen, kept

    def __call__(self, pictures: Tensor, keys: Sequence[int]) -> Tensor:
        apart, at = (torch.cdist(signature(pictures), self.seen.to(pictures)) / self.seen.shape[1] ** 0.5).min(1)
        if float(apart.max()) > NEAR:
            raise OneStepError(
                f"the control {self.name[:40]!r} has examples for {len(self.seen)} pictures, and the run draws another "
                "one: draw the pictures anew with this run's model, prompts, LoRA, sizes, seed, batch and pairs"
            )
        return self.kept.to(pictures.device)[at].float() / 255


def signature(pictures: Tensor) -> Tensor:
    """[N, 3 * 16 * 16] means over the cells of a grid, by which a picture is known again."""
    return adaptive_avg_pool2d(pictures, SIDE).flatten(1)


def _check(pictures: Tensor, controls: Tensor) -> None:
    if pictures.ndim != 4 or pictures.shape[1] != 3 or controls.ndim != 4 or controls.shape[1] not in (1, 3):
        raise OneStepError(
            f"pictures are {list(pictures.shape)}, their controls {list(controls.shape)}: give [N, 3, H, W] and "
            "[N, 1 or 3, H, W]"
        )
    if len(pictures) != len(controls):
        raise OneStepError(f"{len(controls)} controls for {len(pictures)} pictures: give one for each, in their order")
    if not bool(controls.isfinite().all()):
        raise OneStepError("the controls hold numbers that are not finite: check what has made them")
