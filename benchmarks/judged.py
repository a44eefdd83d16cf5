"""LoRAs beside pictures of their teacher and, where they are given, real ones, by the tiny models' frozen judge."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import EACH, ROLE, make_set, pictures
from torch import Tensor

from onestep.cli.evaluate import judge_of, read_pictures
from onestep.cli.lora import read_lora
from onestep.cli.model import at_native_size, open_host
from onestep.core.factors import State
from onestep.core.recipe import Recipe
from onestep.core.router import Router
from onestep.core.step_roles import part_of
from onestep.training.distil import distil
from onestep.training.evaluation.measures import bootstrap, frechet, obeyed, variety
from onestep.training.settings import Settings


def train(model: str, prompts: list[str], settings: Settings, folder: Path) -> Path:
    """The result of a run, made or found."""
    if not (folder / "result.safetensors").is_file():
        host = open_host(model, device="cpu")
        began = time.monotonic()
        distil(host, prompts, at_native_size(settings, set(), host), folder, existing="continue")
        (folder / "seconds.json").write_text(json.dumps(time.monotonic() - began))
    return folder / "result.safetensors"


Seen = tuple[Tensor, dict[str, Tensor]]
"""The judge's features [N, F] and what it takes each picture for, by head."""


class Judged:
    """LoRAs beside a model's own pictures of the same prompts, from other noises; ``real``: pictures beside these."""

    def __init__(
        self, model: str, prompts: list[str], samples: int, folder: Path, judge: str = "tiny", real: Path | None = None
    ) -> None:
        self.host, self.judge = open_host(model, device="cpu"), judge_of(judge, None)
        self.kept = make_set(self.host, prompts, "adapting", samples, same=False)
        self.again = replace(self.kept, name="adapting again", teachers=self.kept.students)
        self.asked = self.judge.asked(self.kept.texts)
        self.real = None if real is None else self.judge.features(read_pictures(real))
        with torch.no_grad(), self.host.denoiser.roles.installed():
            self.teacher = self.features(self.kept.teacher(self.host, folder / "teacher.safetensors"))
            self.second = self.features(self.again.teacher(self.host, folder / "second.safetensors"))

    def features(self, latents: Tensor) -> Seen:
        images = pictures(self.host, latents)
        return self.judge.features(images), {head: one.argmax(1) for head, one in self.judge.predict(images).items()}

    def untrained(self, recipe: Recipe) -> dict[str, Any]:
        """The model itself in the recipe's steps."""
        return self.scores(self.features(self._drawn(({},), recipe, ())))

    def __call__(self, lora: Path) -> dict[str, Any]:
        return self.scores(self.seen(lora))

    def seen(self, lora: Path) -> Seen:
        """What the judge sees in the LoRA's pictures."""
        return self.features(self.latents(lora))

    def latents(self, lora: Path) -> Tensor:
        """The LoRA's pictures, drawn from the same noises for every LoRA."""
        found = read_lora(str(lora), self.host)
        return self._drawn((found.state, *found.later), found.recipe, found.parts)

    def _drawn(self, states: tuple[State, ...], recipe: Recipe, parts: Router | tuple[float, ...]) -> Tensor:
        """states: a LoRA; or one for each step or kind of prompt, by ``parts``."""
        roles = self.host.denoiser.roles
        with torch.no_grad(), roles.installed():
            for part, state in enumerate(states):
                roles.load(part_of(ROLE, part), state)
            if len(states) > 1:
                roles.steps.split(ROLE, parts)
            try:
                return self.kept.student(self.host, recipe)
            finally:
                roles.drop(ROLE)

    def scores(self, seen: Seen) -> dict[str, Any]:
        """FD-local to the model's pictures and to real ones with their intervals, the judge's agreement with the
        prompts, variety."""
        features, chosen = seen
        wanted, real = self.teacher[0], self.real
        told = self._distance("fd", lambda rows: frechet(features[rows], wanted[rows]))
        if real is not None:
            told |= self._distance("fd_real", lambda rows: frechet(features[rows], real))
        told |= {head: obeyed(chosen[head], asked) for head, asked in self.asked.items()}
        return told | {"variety": float(variety(features, EACH).sum() / variety(wanted, EACH).sum())}

    def beside(self, seen: Seen, other: Seen) -> dict[str, float]:
        """FD-local and variety of ``seen`` less those of ``other``.

        The same prompts are redrawn for both: what the choice of prompts does to both alike is not in the intervals.
        """
        ours, others, wanted = seen[0], other[0], self.teacher[0]
        spread = variety(wanted, EACH)

        def nearer(rows: Tensor) -> float:
            return frechet(ours[rows], wanted[rows]) - frechet(others[rows], wanted[rows])

        def wider(rows: Tensor) -> float:
            more = variety(ours[rows], EACH).sum() - variety(others[rows], EACH).sum()
            return float(more / spread.sum())

        return self._distance("fd_less", nearer) | self._distance("variety_more", wider)

    def _distance(self, name: str, of_rows: Callable[[Tensor], float]) -> dict[str, float]:
        found = bootstrap(of_rows, len(self.kept.texts) // EACH, EACH)
        return {name: found.value, f"{name}_half": found.value - found.low}
