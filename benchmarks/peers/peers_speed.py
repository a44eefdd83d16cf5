"""A whole update of ours over a whole one of theirs: the same network, batch and rank, in pairs, one after the other.

Ours is the trainer's own step, as in every run: its draw of prompts and pictures, its loss and backward, its clip and
its AdamW. Theirs is their step and backward, a clip and their optimiser. Both have the teacher's pictures already made,
keep all activations and no running mean. Time is the process' own, which other programs disturb little, in one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from world import PROMPTS, SIZE, World

from onestep.core.recomputed import NOTHING
from onestep.pipelines.adapt import adapt
from onestep.pipelines.load import load
from onestep.training.engine.prompts import embed
from onestep.training.engine.setup import Setup, hooked
from onestep.training.engine.student import add_student
from onestep.training.engine.trainer import Trainer
from onestep.training.methods import METHODS, settings_for
from onestep.training.methods.distribution_matching import CRITIC

RANK, CLIP, WARM_UP = 16, 1.0, 2
SHARED = {
    **{"steps": 10_000, "batch": len(PROMPTS), "pairs": len(PROMPTS), "rank": RANK, "teacher_steps": 1, "ema": 0.0},
    **{"max_grad_norm": CLIP, "sizes": f"{SIZE[0]}x{SIZE[1]}", "checkpointing": False, "guidance": 3.0},
}
MATCHING = {"warm_start": 0, "critic_warm_up": 0, "anchor": 0.0, "critic_updates": 1, "matching_guidance": 3.0}
Update = Callable[[int], Any]


@dataclass(frozen=True)
class Pace:
    """method, peer, what: of the pairs. ours, theirs: seconds of each."""

    method: str
    peer: str
    model: str
    ours: list[float]
    theirs: list[float]

    def line(self) -> str:
        ratios = [mine / other for mine, other in zip(self.ours, self.theirs, strict=True)]
        middle = [1000 * statistics.median(seconds) for seconds in (self.ours, self.theirs)]
        told = f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f}"
        return f"| {self.peer} | {self.method} | {self.model} | {middle[0]:.0f} | {middle[1]:.0f} | {told} |"


HEAD = "| peer | ours | model | ours, ms | theirs, ms | median of ratios | from, to |\n|---|---|---|---|---|---|---|"


def paired(method: str, peer: str, model: str, ours: Update, theirs: Update, pairs: int) -> Pace:
    seconds: tuple[list[float], list[float]] = [], []
    for at in range(-WARM_UP, pairs):
        # which of the two is first alternates
        for side in (0, 1) if at % 2 else (1, 0):
            began = time.process_time()
            (ours, theirs)[side](at + WARM_UP)
            if at >= 0:
                seconds[side].append(time.process_time() - began)
    return Pace(method, peer, model, *seconds)


@contextmanager
def our_update(model: str, method: str, **values: Any) -> Iterator[Update]:
    """Within, the step of a run's trainer."""
    host, kind = adapt(load(model)), METHODS[method]
    settings = settings_for(method, **SHARED, **values)
    with TemporaryDirectory() as folder, host.training(), hooked(host, NOTHING):
        prompts = embed(host, PROMPTS, settings, Path(folder))
        setup = Setup(host, settings, prompts, Path(folder), kind.recipe(host, settings))
        add_student(host, settings, None)
        yield Trainer(host, settings, setup.recipe, prompts, kind.plan(setup)).step


# -- theirs -----------------------------------------------------------------------------------------------------------


def script_update(folder: Path, name: str) -> Update:
    """Of diffusers' script, with the AdamW that it makes."""
    from lcm_script import LEVELS, ScriptStep, script

    world = World("tiny", torch.float32, RANK)
    step = ScriptStep.of(script(folder, name), world, world.nulls, "huber")
    learnt = learning(step.network)
    optimizer = torch.optim.AdamW(learnt, 1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)

    def update(at: int) -> None:
        noise, index = torch.randn_like(world.x0), torch.randint(0, LEVELS, (len(world.x0),))
        step(world.x0, noise, index).backward()
        torch.nn.utils.clip_grad_norm_(learnt, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def fastgen_update(model: str, kind: str, schedule: str, turns: tuple[int, ...] = (0,), **changes: Any) -> Update:
    """turns: iterations of theirs that are one update of ours."""
    from fastgen_network import Network
    from fastgen_network import model as made

    world = World(model, torch.float32, RANK)
    theirs = made(world, kind, schedule, guidance_scale=3.0, net_optimizer__optim_type="adamw", **changes)
    theirs.ratio = 0.9
    learnt = [learning(theirs.net)]
    if kind == "dmd2":
        theirs.fake_score = Network(world, CRITIC, schedule)
        learnt.append(learning(theirs.fake_score))
    theirs.init_optimizers()
    data = {"real": world.x0, "condition": world.batch.cond, "neg_condition": world.nulls}

    def update(at: int) -> None:
        for turn in turns:
            losses, _ = theirs.single_train_step(data, turn)
            losses["total_loss"].backward()
            torch.nn.utils.clip_grad_norm_(learnt[turn % len(learnt)], CLIP)
            theirs.optimizers_schedulers_step(turn)
            theirs.optimizers_zero_grad(turn)

    return update


def learning(network: nn.Module) -> list[nn.Parameter]:
    return [value for value in network.parameters() if value.requires_grad]


# -- the pairs --------------------------------------------------------------------------------------------------------


def script_pace(folder: Path, pairs: int) -> Iterator[Pace]:
    name = "train_lcm_distill_lora_sdxl"
    with our_update("tiny", "lcm") as ours:
        yield paired("lcm", name, "tiny", ours, script_update(folder, name), pairs)


def fastgen_paces(pairs: int) -> Iterator[Pace]:
    cd, finite = {"loss_config__use_cd": True}, {"loss_config__use_jvp_finite_diff": True}
    flow_times = {"sample_t_cfg__time_dist_type": "logitnormal"}
    cases: list[tuple[str, str, str, dict[str, Any], Update]] = [
        ("ect", "CM", "tiny", {}, fastgen_update("tiny", "cm", "edm")),
    ]
    for told, exact in (("forward", {}), ("differences", finite)):
        for method, kind, peer in (("scm", "scm", "sCM"), ("meanflow", "mean_flow", "MeanFlow")):
            theirs = fastgen_update("tiny-flow", kind, "rf", **cd, **exact, **flow_times)
            cases.append((method, f"{peer}, tangent by {told}", "tiny-flow", {"tangent": told}, theirs))
    for model, schedule in (("tiny", "alphas"), ("tiny-flow", "rf")):
        levels = {"sample_t_cfg__time_dist_type": "uniform", "gan_loss_weight_gen": 0.0}
        theirs = fastgen_update(model, "dmd2", schedule, (1, 0), **levels)
        cases.append(("dmd", "DMD2 without its head", model, MATCHING, theirs))
    for method, peer, model, values, theirs in cases:
        with our_update(model, method, **values) as ours:
            yield paired(method, f"FastGen {peer}", model, ours, theirs, pairs)
