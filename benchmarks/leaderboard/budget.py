"""How many updates of a method are as much work as those of another: in network forwards of one sample, pairs,
trajectories, critics and heads counted, as the run itself reckons them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onestep.core.errors import OneStepError
from onestep.training.engine.prompts import embed
from onestep.training.engine.setup import Setup
from onestep.training.engine.student import STUDENT, add_student
from onestep.training.engine.trainer import EMA
from onestep.training.methods import METHODS
from onestep.training.settings import Settings, described

Cost = Callable[[Settings], float]
FEW = 32
"""Below as many updates a method of several stages may refuse a run."""


@contextmanager
def costs(host: Any, prompts: list[str], settings: Settings) -> Iterator[Cost]:
    """The forwards of one sample in a whole run of settings that have the prompts in common with ``settings``."""
    method, roles = METHODS[settings.method], host.denoiser.roles
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        embedded = embed(host, prompts, settings, folder / "embeddings")

        def cost(settings: Settings) -> float:
            setup = Setup(host, settings, embedded, folder, method.recipe(host, settings))
            add_student(host, settings, None)
            roles.copy(STUDENT, EMA)
            try:
                plan = method.plan(setup)
            finally:
                for role in list(roles.names()):
                    roles.drop(role)
            return float(plan.cost(0, plan.updates))

        yield cost


def settled(settings: Settings, forwards: float, cost: Cost) -> Settings:
    """``settings`` with as many updates as ``forwards`` allow, at least one. A warm start, where the method has one,
    is a fifth of them."""

    def fits(steps: int) -> bool:
        try:
            return cost(scaled(settings, steps)) <= forwards
        except OneStepError:
            if steps >= FEW:
                raise
            return True

    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return scaled(settings, low)


def scaled(settings: Settings, steps: int) -> Settings:
    own = {entry.name for entry in described(settings.own)}
    shares = {"warm_start": 5, "critic_warm_up": 20, "head_warm_up": 20, "twin_warm_up": 20}
    told = {name: steps // part for name, part in shares.items() if name in own}
    if "snapshots" in own:  # of the critic, as it warms up
        told["critic_warm_up"] = max(told["critic_warm_up"], settings.own.snapshots)
    return settings.with_(steps=steps, **told)
