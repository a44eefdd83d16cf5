"""Switches of the recipe, each alone against the default, at as many network forwards.

    python benchmarks/recipe.py --model tiny --steps 1 4 --ablation --reference tiles.npz --out runs/recipe/tiny
    python benchmarks/recipe.py --model tiny --steps 1 4 --reference tiles.npz --out runs/recipe/tiny

--ablation: regression alone, dmd alone and both, each from nothing; dmd alone spends on updates what the teacher's
pairs cost the others. Else every switch goes on from one warm start, with a critic of its own. A line of rows.jsonl is
written as each row is known; it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from recipe_table import DEFAULT, Table, markdown

from onestep.cli.demo import SMALLER
from onestep.cli.lora import read_lora
from onestep.cli.model import at_native_size, open_host, read_prompts
from onestep.core.errors import OneStepError
from onestep.training.engine.prompts import embed
from onestep.training.engine.setup import Setup
from onestep.training.engine.student import STUDENT, add_student
from onestep.training.methods import METHODS
from onestep.training.presets import preset
from onestep.training.settings import Settings

QUIET = {"preview_every": 0, "watch_every": 0}
RATE = 5e-4
"""Of regression, in the warm start and alone."""
ONE_AND_MORE: dict[str, dict[str, Any]] = {
    "critic 1:1": {"critic_updates": 1},
    "critic 2:1": {"critic_updates": 2},
    "critic 2:1, follows 0.001": {"critic_updates": 2, "follow": 1e-3},
    "critic 5:1": {"critic_updates": 5},
    "critic 2:1, follows 0.01": {"critic_updates": 2, "follow": 1e-2},
    "shared pictures": {"critic_pictures": "shared"},
    "critic's weight eps": {"critic_weight": "eps"},
    "critic's weight x0": {"critic_weight": "x0"},
    "matching's scale mean": {"matching_scale": "mean"},
    "no anchor": {"anchor": 0.0},
    "anchor each 4th": {"anchor_every": 4},
    "k 1": {"matching_guidance": 1.0},
    "k 4": {"matching_guidance": 4.0},
    "k random 1 to 4": {"matching_guidance": 1.0, "guidance_end": 4.0, "guidance_schedule": "random"},
    "k falling 4 to 1": {"matching_guidance": 4.0, "guidance_end": 1.0, "guidance_schedule": "falling"},
    "rescale 0.7": {"guidance_rescale": 0.7},
    "floor 0.05": {"normaliser_floor": 0.05},
    "levels apart": {"separate_levels": True},
    "levels falling to 0.5": {"level_high_end": 0.5},
    "student's rate x 4": {"learning_rate": 4e-4},
    "both rates / 2": {"learning_rate": 5e-5, "critic_learning_rate": 2e-4},
    "vsd": {"method": "vsd"},
    "pg-sb": {"method": "pg-sb"},
    "dmd2": {"method": "dmd2"},
    "f-distill": {"method": "f-distill"},
    "ladd": {"method": "ladd"},
    "dmd2, term at once, head 1e-3": {"method": "dmd2", "gan_start": 0.0, "gan_ramp": 0.0, "head_learning_rate": 1e-3},
    "ladd, head 1e-3": {"method": "ladd", "head_learning_rate": 1e-3},
}
"""Changes to the default."""
OF_SEVERAL: dict[str, dict[str, Any]] = {
    "cdm": {"method": "cdm"},
    "tdm": {"method": "tdm"},
    "diversity anchor 0.05": {"diversity_anchor": 0.05},
    "a LoRA for each step": {"step_loras": True},
}
"""Those that a student of one step cannot have; the first in the order."""


@dataclass(frozen=True)
class Cost:
    """Forwards of a sample in an update of the method's last phase, of the critic's, of regression; of a pair."""

    matching: float
    critic: float
    regression: float
    pair: float


def costs(model: str, prompts: list[str], settings: Settings) -> Cost:
    """As the run's own plan has them."""
    host, method = open_host(model, device="cpu"), METHODS[settings.method]
    settings = at_native_size(settings, set(), host)
    with TemporaryDirectory() as folder, host.denoiser.roles.installed(), host.training():
        texts = embed(host, prompts[:1], settings, Path(folder) / "texts")
        setup = Setup(host, settings, texts, Path(folder), method.recipe(host, settings))
        add_student(host, settings, None)
        host.denoiser.roles.copy(STUDENT, "ema")
        phases = {phase.name: phase for phase in method.plan(setup).phases}
    warm, critic, last = phases["warm start"], phases.get("critic"), phases[settings.method]
    return Cost(last.cost, 0.0 if critic is None else critic.cost, warm.cost, warm.fresh_cost)


def default(of: int, **changes: Any) -> Settings:
    """The demo's settings, of a student of so many steps."""
    return preset("Balanced", **(SMALLER | QUIET | {"student_steps": of} | changes))


# -- the rows ---------------------------------------------------------------------------------------------------------

Made = tuple[str, Settings]


class Rows:
    """Each row's settings. length: updates of the default's matching."""

    def __init__(self, args: argparse.Namespace, prompts: list[str], steps: int) -> None:
        self.args, self.prompts, self.steps = args, prompts, steps
        self.default = default(steps, steps=args.length)
        self.cost = costs(args.model, prompts, self.default)

    def wanted(self, name: str) -> bool:
        """Whether this row was asked for."""
        return not self.args.rows or name in self.args.rows

    @property
    def budget(self) -> float:
        """Forwards of a sample of the batch in the default's critic and matching phases."""
        return self.default.own.critic_warm_up * self.cost.critic + self.args.length * self.cost.matching

    def ablation(self) -> Iterator[Made]:
        """From nothing; the run's whole budget, pairs included, is the same for all."""
        own, cost, few = self.default.own, self.cost, self.default
        more = round(self.budget / cost.regression)
        yield "both", few
        changes = {name: getattr(few, name) for name in ("batch", "pairs", "student_steps", "checkpointing")} | QUIET
        alone = preset("Fast", **changes, steps=own.warm_start + more, learning_rate=RATE)
        yield "regression alone", alone
        pairs = few.pairs / few.batch * cost.pair
        without = default(self.steps, anchor=0.0, warm_start=0)
        left = self.budget + own.warm_start * cost.regression + pairs - own.critic_warm_up * cost.critic
        updates = left / costs(self.args.model, self.prompts, without.with_(warm_start=1)).matching
        yield "dmd alone", without.with_(steps=round(updates))

    def warm(self) -> Settings:
        """The start of every switch."""
        return self.default.with_(steps=0)

    def switches(self, start: Path, seed: int = 0) -> Iterator[Made]:
        """Each alone, from ``start``."""
        several = {} if self.steps == 1 else OF_SEVERAL
        for name, changes in {DEFAULT: {}, **several, **ONE_AND_MORE}.items():
            if not self.wanted(name):
                continue
            chosen = default(self.steps, seed=seed, **{"warm_start": 1, "steps": self.args.length, **changes})
            cost = costs(self.args.model, self.prompts, chosen)
            updates = (self.budget - getattr(chosen.own, "critic_warm_up", 0) * cost.critic) / cost.matching
            yield name, chosen.with_(steps=round(updates), warm_start=0, initial_lora=str(start))
        if not self.wanted("regression"):
            return
        more = round(self.budget / self.cost.regression)
        changes = {name: getattr(self.default, name) for name in ("batch", "pairs", "student_steps", "checkpointing")}
        alone = preset("Fast", **changes, **QUIET, seed=seed, steps=more, learning_rate=RATE, initial_lora=str(start))
        yield "regression", alone


def make(table: Table, part: str, rows: Iterator[Made]) -> None:
    """Those that a model cannot have are left out, with the reason."""
    for name, settings in rows:
        try:
            table.made(part, name, settings)
        except OneStepError as error:
            print(f"{name}: {error}", flush=True)


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row's scores."""
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = read_prompts(args.prompts)
    table = Table(args, prompts)
    if not table.lines:
        scores = table.judged.scores
        table.add({"part": "model", "row": "teacher, another seed", "steps": 0, **scores(table.judged.second)})
    for steps in args.steps:
        rows = Rows(args, prompts, steps)
        start = table.made("start", "warm start", rows.warm())
        if args.ablation:
            make(table, "ablation", (row for row in rows.ablation() if rows.wanted(row[0])))
        for seed in [] if args.ablation else args.seeds:
            make(table, "switch", rows.switches(start, seed))
            table.compare(steps, seed)
        key = {"part": "model", "row": "untrained", "steps": steps}
        if not table.known(**key):
            table.add({**key, **table.judged.untrained(read_lora(str(start), table.judged.host).recipe)})
    return table.lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", default="pipelines/tiny/prompts.txt")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4], help="of the students")
    parser.add_argument("--ablation", action="store_true", help="regression, dmd and both, in place of the switches")
    parser.add_argument("--rows", nargs="+", default=[], help="these alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the switches' runs")
    parser.add_argument("--length", type=int, default=100, help="updates of the default's matching")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--reference", type=Path, help="real pictures, .npz")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe/tiny"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("\n".join(markdown(measured(args))))


if __name__ == "__main__":
    main()
