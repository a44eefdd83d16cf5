"""How many updates of a method are as much work as those of another: in network forwards of one sample, pairs,
trajectories, critics and heads counted, as the run itself reckons them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from onestep.training.engine.prompts import embed
from onestep.training.engine.setup import Setup
from onestep.training.engine.student import add_student
from onestep.training.methods import METHODS
from onestep.training.settings import Settings, described


def settled(settings: Settings, forwards: float, make_host: Any, prompts: list[str]) -> Settings:
    """``settings`` with as many updates as ``forwards`` allow, at least one. A warm start, where the method has one,
    is a fifth of them."""
    low, high = 1, 2
    while cost(scaled(settings, high), make_host, prompts) <= forwards:
        low, high = high, 2 * high
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        fits = cost(scaled(settings, middle), make_host, prompts) <= forwards
        low, high = (middle, high) if fits else (low, middle)
    return scaled(settings, low)


def scaled(settings: Settings, steps: int) -> Settings:
    own = {entry.name for entry in described(settings.own)}
    shares = {"warm_start": 5, "critic_warm_up": 20, "head_warm_up": 20, "twin_warm_up": 20}
    return settings.with_(steps=steps, **{name: steps // part for name, part in shares.items() if name in own})


def cost(settings: Settings, make_host: Any, prompts: list[str]) -> float:
    """Forwards of one sample in a whole run."""
    host, method = make_host(), METHODS[settings.method]
    with tempfile.TemporaryDirectory() as folder:
        embedded = embed(host, prompts, settings, Path(folder) / "embeddings")
        setup = Setup(host, settings, embedded, Path(folder), method.recipe(host, settings))
        add_student(host, settings, None)
        plan = method.plan(setup)
    return float(plan.cost(0, plan.updates))
