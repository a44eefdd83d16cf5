"""A run's training step on the meta device: the real engine, method and optimiser, on a network without weights."""

from __future__ import annotations

import gc
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.memory import Result, Slices
from ...core.recomputed import BLOCKS
from ...core.roles import State
from ..data.captioned_pictures import FOLDER as PICTURES
from ..data.pairs import MADE, evaluations
from ..engine.prompts import embed
from ..engine.setup import Setup, hooked
from ..engine.student import STUDENT, add_student
from ..engine.trainer import EMA, Trainer
from ..engine.turns import Phase, Plan, Turn
from ..host import Host
from ..methods import METHODS
from ..methods.alternating import ANCHOR
from ..settings import Settings
from ..watch.measures import Watch
from ..watch.reference import by_teacher
from .attention import as_on
from .meter import Meter
from .odd import BATCHES, PROMPT, RANKS, prime, sizes_of, tensors_of, undrawn, with_a_picture, without_donor
from .rehearsed import Beside, PhaseWork
from .rehearsed import Rehearsed as Rehearsed
from .trace import DECODE as DECODE
from .trace import Count

PROMPTS, REFERENCE, WATCH, LOOK, OPTIMIZER = "prompts", "reference", "watch", "look", "optimiser"
FORWARD, MOMENTS = "forward", "moments"
INITIAL = "initial LoRA"
"""What lies under an adapter module, and does not learn."""
WATCHED = 4
"""Micro-batches of pictures that the watch compares: whole groups of one prompt's pictures."""
TEXTS, OWN = "texts", "own"


def rehearse(
    host: Host,
    settings: Settings,
    *,
    machine: str = "cuda",
    scaled: bool = True,
    recompute: str = BLOCKS,
    sliced: bool = True,
) -> Rehearsed:
    """Count one update of each of the run's phases, one slice of its watch and one picture's decoding.

    host: a shell, whose weights are on the meta device. machine: whose attention it is. scaled: at a batch and a rank
    from which others are reckoned; else at the settings' own. recompute, sliced: as the engine's Trainer has them; a
    run that is fitted to a card asks roles one after the other. Whatever is made on the way is as good as nothing.
    Raises OneStepError where the method cannot be had with this host.
    """
    sizes = sizes_of(host, settings)
    p, r = (prime(BATCHES, sizes), prime(RANKS, sizes)) if scaled else (settings.batch, settings.rank)
    few = settings.with_(
        **{"batch": p, "accumulation": 1 if scaled else settings.accumulation, "rank": r, "pairs": p},
        **{"teacher_steps": 1, "watch_samples": WATCHED * p, "seed": 0},
        optimizer="auto" if settings.optimizer == "adamw8bit" else settings.optimizer,
    )
    few = without_donor(few)
    meter = Meter()
    meter.hold(tensors_of(host.network), "base")
    with (
        tempfile.TemporaryDirectory(prefix="onestep-plan-") as folder,
        _uncollected(),
        torch.inference_mode(False),
        torch.enable_grad(),
        as_on(machine),
        meter,
    ):
        few = with_a_picture(few, Path(folder) / OWN)
        played = _Rehearsal(host, few, settings, Path(folder), meter, recompute, sliced)
        played.play()
    count = Count.of(meter.trace, p, r)
    found = played.phases(count), played.gradients(count), dict(played.passes), played.beside
    return Rehearsed(count, *found)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Within, no garbage is collected, which would free bytes at one time or another; and takes its time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


class _First(Slices):
    """The first slice in the place of every other, which need what it needs."""

    def __call__(self, rows: Sequence[int], make: Callable[[list[int]], Result]) -> list[Result]:
        return [make(list(rows[: self.size]))] * -(-len(rows) // self.size)


class _Rehearsal:
    """settings: those that are played. asked: the run's own."""

    def __init__(
        self, host: Host, settings: Settings, asked: Settings, folder: Path, meter: Meter, recompute: str, sliced: bool
    ) -> None:
        self.host, self.settings, self.asked, self.folder, self.meter = host, settings, asked, folder, meter
        self.recompute, self.sliced = recompute, sliced
        self.method = METHODS[settings.method]
        self.passes: dict[str, float] = defaultdict(int)

    def play(self) -> None:
        """In a run's own order."""
        host, settings, method = self.host, self.settings, self.method
        method.check(host, settings)
        with self.meter.part(PROMPTS):
            prompts = embed(host, [PROMPT], settings, self.folder / TEXTS, guidance_input=method.guidance_input)
        self.setup = Setup(host, settings, undrawn(prompts), self.folder, method.recipe(host, settings))
        with ExitStack() as stack:
            stack.enter_context(host.training())
            stack.enter_context(hooked(host, self.recompute))
            stack.callback(self._forget)
            stack.callback(host.network.register_forward_pre_hook(self._pass).remove)
            trainer = self._trainer()
            self._watch_and_train(trainer)

    def _watch_and_train(self, trainer: Trainer) -> None:
        setup, settings, part = self.setup, self.settings, self.meter.part
        watched = settings.watch_every or settings.preview_every
        with part(REFERENCE):
            slices = _First(settings.batch // settings.accumulation, "the watch's pictures")
            watch = Watch.prepare(setup, self.method.reference(setup), slices=slices) if watched else None
        for update in range(trainer.plan.updates):
            trainer.forget_moments(update)  # before others are made, as they are in a run
            self._have_moments(trainer, trainer.plan.at(update)[0])
            with part(OPTIMIZER):
                trainer.step(update)
            self._label_moments(trainer)
        if watch is not None:
            with part(WATCH):
                drawn = watch.student(self.host, setup.recipe, EMA if settings.ema else STUDENT)
            if watch.by_look(self.host):
                with part(LOOK):
                    watch.look(self.host, drawn)
        if settings.preview_every:
            self.host.decode(torch.empty(1, *setup.prompts.shapes[setup.prompts.sizes[0]], device=self.host.device))
        with part(FORWARD):
            self._forward()
        self.beside = self._beside()

    def _pass(self, *unused: Any) -> None:
        self.passes[self.meter.trace.part] += (1 + torch.is_grad_enabled()) * self.meter.trace.times

    def _trainer(self) -> Trainer:
        host, settings = self.host, self.settings
        add_student(host, settings, self._initial(), self.method.adapter)
        host.denoiser.roles.copy(STUDENT, EMA)
        trainer = Trainer(
            host, settings, self.setup.recipe, self.setup.prompts, self._once(self.method.plan(self.setup))
        )
        trainer.sliced = self.sliced
        frozen = {id(p.untyped_storage()) for p in host.denoiser.roles.parameters(STUDENT) if not p.requires_grad}
        for role in host.denoiser.roles.names():
            for parameter in host.denoiser.roles.parameters(role):
                self.meter.hold([parameter], INITIAL if id(parameter.untyped_storage()) in frozen else role)
                if role in trainer.plan.roles and parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._label_gradient(f"{role} gradients"))
        return trainer

    def _initial(self) -> State | None:
        """The factors that lie under an adapter module, of an initial LoRA at the run's rank."""
        if self.method.adapter is None or not self.settings.initial_lora:
            return None
        rank, targets = self.settings.rank, self.host.denoiser.roles.targets
        empty = partial(torch.empty, device=self.host.device)
        return {name: (empty(place.shape_a(rank)), empty(place.shape_b(rank))) for name, place in targets.items()}

    def _once(self, plan: Plan) -> Plan:
        """One update of each phase, and each loss once: where it is last learnt from, beside all that is there then."""
        last = {(turn.role, turn.loss): phase for phase in plan.phases if phase.updates for turn in phase.turns}
        phases = []
        for phase in plan.phases:
            turns = {turn.loss: turn for turn in phase.turns if last.get((turn.role, turn.loss)) is phase}
            if turns:
                named = [replace(turn, loss=self._named(turn, part_of(phase, turn))) for turn in turns.values()]
                phases.append(replace(phase, updates=1, turns=named))
        self._plan, self._last = plan, {key: part_of(phase, key[0]) for key, phase in last.items()}
        return Plan(plan.roles, phases)

    def _named(self, turn: Turn, part: str) -> Any:
        def loss(batch: Any, share: float, update: int) -> Any:
            with self.meter.part(part):
                return turn.loss(batch, share, update)

        return loss

    def phases(self, count: Count) -> tuple[PhaseWork, ...]:
        """Of the whole run."""
        found = []
        for phase in self._plan.phases:
            times: dict[str, float] = {}
            for turn in phase.turns if phase.updates else ():
                part = self._last[turn.role, turn.loss]
                for name in [part, *(name for name, around in count.within.items() if around == part != name)]:
                    times[name] = times.get(name, 0) + phase.rare.get(name, 1)
            times.pop(MADE, None)
            found.append(PhaseWork(phase.name, phase.updates, times, self._draws[phase.name]))
        return tuple(found)

    def _beside(self) -> Beside:
        """The run's own teacher takes more steps."""
        ours, method, recipe = self.settings, self.method, self.setup.recipe
        asked = replace(ours, teacher_steps=self.asked.teacher_steps, second_order=self.asked.second_order)
        played = max(phase.fresh_cost for phase in self._plan.phases)
        wanted = max(phase.fresh_cost for phase in method.plan(replace(self.setup, settings=asked)).phases)
        # where there are more data than updates, every phase that learns of them makes some
        updates = sum(phase.updates for phase in self._plan.phases)
        many = replace(self.setup, settings=replace(ours, batch=1, accumulation=1, pairs=min(updates + 1, 10**6)))
        self._draws = {phase.name: _share_that_draws(phase) for phase in method.plan(many).phases}
        of_teacher = method.reference is by_teacher
        texts = (TEXTS, "embeddings", OWN, PICTURES)
        kept = {path.name: self._each(path) for path in sorted(self.folder.iterdir()) if path.name not in texts}
        return Beside(
            making=wanted / played if played else 0.0,
            reference=float(evaluations(asked) / evaluations(ours)) if of_teacher else 1.0,
            watch=method.recipe(self.host, asked).steps / recipe.steps,
            kept=kept,
            text=sum(path.stat().st_size for path in (self.folder / TEXTS).iterdir()) // 2,
        )

    def _each(self, folder: Path) -> float:
        """Bytes of a sample in ``folder``, of which each file has a batch."""
        sizes = [path.stat().st_size for path in folder.iterdir()]
        return sum(sizes) / len(sizes) / self.settings.batch

    def gradients(self, count: Count) -> dict[str, str]:
        """By part, whose gradients there are."""
        owners = {part: role for (role, _), part in self._last.items()}
        found = {name: owners.get(name, owners.get(around)) for name, around in count.within.items() if name != MADE}
        return {name: f"{role} gradients" for name, role in found.items() if f"{role} gradients" in count.labels}

    def _label_gradient(self, label: str) -> Any:
        return lambda parameter: self.meter.hold([parameter.grad], label)

    def _have_moments(self, trainer: Trainer, phase: Phase) -> None:
        """Those that the second update of a phase finds: made by a step on gradients of zeros, that goes nowhere."""
        for turn in phase.turns:
            optimizer = trainer.optimizers[turn.role]
            if optimizer.state:
                continue
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            group = optimizer.param_groups[0]
            group["betas"] = (turn.beta1, 0.99)
            # as on a card, where the step is one kernel; torch's own class asks where its state lies as it makes it
            whole = "fused" in group and type(optimizer) is not torch.optim.AdamW
            group |= {"fused": True} if whole else {}
            with self.meter.part(MOMENTS):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            group |= {"fused": True} if "fused" in group else {}
        self._label_moments(trainer)

    def _label_moments(self, trainer: Trainer) -> None:
        for role, optimizer in trainer.optimizers.items():
            for entries in optimizer.state.values():
                moments = [value for value in entries.values() if isinstance(value, Tensor) and value.is_meta]
                self.meter.hold(moments, f"{role} moments")

    def _forward(self) -> None:
        batch = self.setup.prompts.batch(0, range(self.settings.batch))
        sigma = self.setup.recipe.levels(self.host.denoiser.schedule)[0].expand(len(batch))
        with torch.no_grad():
            self.host.denoiser(batch.normal("plan"), sigma, batch.cond)

    def _forget(self) -> None:
        for role in self.host.denoiser.roles.names():
            self.host.denoiser.roles.drop(role)


def _share_that_draws(phase: Phase) -> float:
    """In which share of a phase's updates it learns of data that is made once and kept."""
    return next((share for part, share in phase.rare.items() if part.startswith(ANCHOR)), 1.0) * bool(phase.fresh_cost)


def part_of(phase: Phase, turn: Turn | str) -> str:
    """What a turn, or a role's turn, of a phase is called."""
    return f"{phase.name}, {turn if isinstance(turn, str) else turn.role}"
