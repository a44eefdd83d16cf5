"""How often a card is waited for: on the meta device, which stands for it, each read and each copy is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from every_method import short
from narrowed import narrowed
from small_host import SmallHost, setup_of, small

from onestep.training.engine.student import add_student
from onestep.training.engine.trainer import EMA, Trainer
from onestep.training.methods import METHODS
from onestep.training.plan.meter import Meter
from onestep.training.settings import described


def on_meta() -> SmallHost:
    host = SmallHost()
    host.network.to("meta")
    host.device = torch.device("meta")
    return host


def waited(meter: Meter) -> int:
    """Reads, copies to the host, and copies from it that do not go by themselves."""
    return sum(count for name, count in meter.crossings.items() if name != "sent")


def waits(folder: Path, **changes: Any) -> tuple[int, int]:
    """Of the last update, when all data is made; and how many turns it has."""
    settings = small(**{"steps": 2, "batch": 4, "accumulation": 2, "preview_every": 0, "watch_every": 0, **changes})
    host, meter = on_meta(), Meter()
    with meter:
        setup = setup_of(host, settings, folder)
        add_student(host, settings, None)
        host.denoiser.roles.copy("student", EMA)
        trainer = Trainer(host, settings, setup.recipe, setup.prompts, METHODS[settings.method].plan(setup))
        with host.denoiser.roles.installed():
            for update in range(trainer.plan.updates):
                before = waited(meter)
                trainer.step(update)
    phase, _ = trainer.plan.at(trainer.plan.updates - 1)
    return waited(meter) - before, len(phase.turns)


@pytest.mark.parametrize("method", narrowed(METHODS, "regression", "dmd", "f-distill", "guidance-lora", "sun"))
def test_a_card_is_waited_for_once_a_turn(method: str, tmp_path: Path) -> None:
    """However many micro-batches it has: losses, scores and the gradient's norm are read together."""
    few: dict[str, Any] = {"warm_start": 0, "critic_warm_up": 0, "head_warm_up": 0, "critic_updates": 2, "anchor": 0.5}
    few |= {"gan_weight": 1.0, "gan_start": 0.0, "gan_ramp": 0.0, "generator_steps": 2}
    own = {entry.name for entry in described(METHODS[method].settings)}
    few = {name: value for name, value in few.items() if name in own}
    # the pairs of both updates are the first's; of two students the second's are the second update's
    few |= {"steps": 3} if method == "msd" else {}
    found, turns = waits(tmp_path, **short(method, tmp_path) | {"pairs": 4} | few)
    # the ratios' means are of the head's answers; a reward's numbers are looked at in each of two micro-batches,
    # and of both pictures of a pair in each turn
    looked_at = {"di-star": 2, "distillation-dpo": 4 * turns}.get(method, 0)
    assert found == turns + (method in ("f-distill", "uni-instruct")) + looked_at
