"""What the plan counts of a student of several steps is the mean over every step that may be drawn of real updates, one
by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from allocated import training
from flops import ONE_FLOP_A_SECOND, flops_of
from narrowed import narrowed
from tiny_pipelines import make

from onestep.core.recomputed import BLOCKS
from onestep.pipelines.adapt import adapt
from onestep.pipelines.shells import of_host
from onestep.training.engine.batch import Batch
from onestep.training.methods import METHODS, settings_for
from onestep.training.plan.counted import counted
from onestep.training.plan.rungs import Way, rung_of
from onestep.training.settings import Settings

HEAD: dict[str, Any] = {"gan_weight": 1.0, "gan_start": 0.0, "gan_ramp": 0.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dmd": ("dmd", {"student_steps": 4, "critic_updates": 2, "anchor": 0.0}),
    "shared pictures": ("dmd", {"student_steps": 4, "critic_updates": 3, "critic_pictures": "shared"}),
    "two steps": ("dmd", {"student_steps": 2}),
    "a LoRA for each": ("dmd", {"student_steps": 3, "step_loras": True}),
    "diversity anchor": ("dmd", {"student_steps": 4, "diversity_anchor": 0.1, "diversity_steps": 2}),
    "tdm": ("tdm", {"student_steps": 3}),
    "cdm": ("cdm", {"student_steps": 4}),
    "cdm from one step": ("cdm", {"student_steps": 2, "schedule_low": 1, "off_trajectory": 0.0}),
    "cdm, fixed, anchored": ("cdm", {"student_steps": 3, "student_schedule": "fixed", "diversity_anchor": 0.1}),
    "dmd2": ("dmd2", {"student_steps": 3, "head_updates": 2, **HEAD}),
    "f-distill": ("f-distill", {"student_steps": 2, **HEAD}),
    "decoupled-dmd": ("decoupled-dmd", {"student_steps": 3}),
    "disback": ("disback", {"student_steps": 2}),
    "sid": ("sid", {"student_steps": 3, "anchor": 0.0}),
    "sid, guided": ("sid", {"student_steps": 2, "guidance_strategy": "long-short"}),
    "uni-instruct": ("uni-instruct", {"student_steps": 2, **HEAD}),
    "ladd": ("ladd", {"student_steps": 3}),
}
Draws = dict[str, int]
"""By stream, what is drawn whenever a batch is asked for it."""


def settings_of(method: str, more: dict[str, Any]) -> Settings:
    few = {"sizes": "16x16", "rank": 4, "batch": 2, "pairs": 2, "steps": 40, "teacher_steps": 1, "watch_samples": 4}
    alone = {"warm_start": 0, "critic_warm_up": 0, "head_warm_up": 0, "critic_updates": 1}
    own = METHODS[method].settings.__dataclass_fields__
    return settings_for(method=method, **few, **{n: v for n, v in alone.items() if n in own} | more)


def every_draw(settings: Settings) -> list[Draws]:
    """Each equally likely schedule with each equally likely step of it: the steps of a shorter one come up oftener,
    until all schedules count alike."""
    own, first = settings.own, int(bool(getattr(settings.own, "diversity_anchor", 0)))
    longest = int(settings.student_steps)
    random = getattr(own, "student_schedule", "fixed") == "random"
    lengths = range(own.schedule_low, longest + 1) if random else [longest]
    return [
        {"schedule steps": length - lengths[0], "student step": step, "of": length - first}
        for length in lengths
        for step in range(length - first)
    ]


@contextmanager
def drawn(draws: Draws) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "choice", lambda self, high, stream: draws.get(stream, 0))
        yield


@pytest.mark.parametrize("case", narrowed(CASES))
def test_it_is_the_mean_over_all_that_may_be_drawn(case: str, tmp_path: Path) -> None:
    host, settings = adapt(make("sd")), settings_of(*CASES[case])
    whole = rung_of(partial(of_host, host), settings, ONE_FLOP_A_SECOND, Way(settings.batch)).whole
    counted = whole.seconds[settings.method] / settings.steps
    every, found = every_draw(settings), {}
    with training(host, settings, tmp_path) as step:
        step(0)  # whose data is made
        for update, draws in enumerate(every, 1):
            with drawn(draws):
                found[update] = flops_of(partial(step, update)), draws["of"]
    mean = sum(flops / of for flops, of in found.values()) / sum(1 / of for _, of in found.values())
    assert len({flops for flops, _ in found.values()}) > 1, "what is drawn matters"
    assert mean == pytest.approx(counted, rel=1e-9)


def test_a_streamed_base_comes_as_often_as_in_the_mean() -> None:
    """Of four steps one and a half before: pictures of the critic's turn and the student's."""
    shell = of_host(adapt(make("sd")), "all")
    played = counted(shell, settings_of("dmd", {"student_steps": 4, "anchor": 0.0}), BLOCKS)
    # the critic's: its picture, it and its backward; the student's: its picture and backward, and three scores
    assert played.passes["dmd, critic"] == pytest.approx(1.5 + 1 + 2)
    assert played.passes["dmd, student"] == pytest.approx(1.5 + 2 + 3)
