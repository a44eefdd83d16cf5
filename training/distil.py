"""A whole distillation: from a host, prompts and settings to a checked LoRA file, resumable at any instant."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch

from ..core.adapter_file import check_adapter, save_adapter
from ..core.checkpoint import checkpoint_blocks, clone_inputs
from ..core.errors import OneStepError
from ..core.lora_file import save_lora
from ..core.roles import State
from .data.pairs import Pairs
from .engine.inputs import check_base, config_of, initial_state
from .engine.optimizer import refuse_missing
from .engine.prompts import Prompts, check_prompts, embed
from .engine.student import STUDENT
from .engine.trainer import EMA, Numbers, Trainer
from .host import Host
from .methods.distribution_matching import CRITIC
from .methods.registry import METHODS, add_student
from .runs.run import CONTINUE, STOP, Run, opened
from .runs.state import restore, snapshot
from .settings import Settings
from .watch.monitor import Looks
from .watch.progress import Progress, Report, Result, Stopped

__all__ = ["Progress", "Report", "Result", "Stopped", "distil"]

BEFORE = "before training"
"""The phase of the untrained student."""


def distil(
    host: Host,
    prompts: Sequence[str],
    settings: Settings,
    folder: str | Path,
    *,
    existing: str = STOP,
    report: Report | None = None,
) -> Result:
    """Distil ``host``'s checkpoint on ``prompts`` into ``folder``/result.safetensors.

    existing: "continue", "restart" or "stop" where the folder already holds a run. One that is continued may be given
    other ``steps`` and ``pairs`` than it had (sun: other ``steps``); what changes over a run, the step size and nct's
    noise levels, is then as in a run of so many steps. Raises OneStepError for bad input, before anything is written,
    and Stopped for a run that failed. What ``host.poll`` or ``report`` raises passes through, after the state and
    partial.safetensors are saved.
    """
    prompts, folder = check_prompts(prompts), Path(folder).expanduser()
    for size in settings.size_list:
        host.latent_shape(size)
    initial = initial_state(host, settings)
    check_base(host, settings)
    METHODS[settings.method].check(host, settings)
    refuse_missing(settings)
    config = config_of(host, prompts, settings)
    # whatever the caller switched off around us: a run needs gradients
    run_there = opened(folder, config, existing, METHODS[settings.method].adjustable)
    with torch.inference_mode(False), torch.enable_grad(), run_there as (run, goes_on):
        session = _Session(host, prompts, settings, run, report, initial)
        if existing == CONTINUE and not goes_on:
            session.notes.append(f"no run to continue in {folder}: started anew")
        session.notes += filter(None, [METHODS[settings.method].note(settings)])
        return session.run_all(goes_on)


class _Session:
    """One process's part of a run."""

    def __init__(
        self, host: Host, prompts: list[str], settings: Settings, run: Run, report: Report | None, initial: State | None
    ) -> None:
        self.host, self.settings, self.run = host, settings, run
        self.report = report or (lambda progress: None)
        self.texts, self.initial, self.notes = prompts, initial, list[str]()
        self.started, self.seconds_before = time.monotonic(), 0.0
        self.update, self.saved_at = 0, time.monotonic()

    # -- the run ------------------------------------------------------------------------------------------------------

    def run_all(self, goes_on: bool) -> Result:
        with ExitStack() as stack:
            prompts = embed(self.host, self.texts, self.settings, self.run.folder / "embeddings")
            stack.enter_context(self.host.training())
            self._hang_hooks(stack)
            self.trainer = self._trainer(prompts)
            referee = METHODS[self.settings.method].referee
            self.looks = Looks(self.host, self.settings, self.trainer.recipe, self.run.folder, referee)
            if goes_on:
                self._restore()
                self._adjust()
            else:
                self._save()
            try:
                self.looks.prepare(prompts)
                self._train()
            except BaseException as error:
                self._leave(error)
                raise
            return self._finish()

    def _hang_hooks(self, stack: ExitStack) -> None:
        """Adapters first; then copies of what the host overwrites; then checkpoints around both."""
        roles = self.host.denoiser.roles
        stack.enter_context(roles.installed())
        stack.callback(self._forget_roles)
        stack.enter_context(clone_inputs(self.host.in_place))
        blocks = checkpoint_blocks(self.host.blocks, roles) if self.settings.checkpointing else nullcontext()
        stack.enter_context(blocks)

    def _forget_roles(self) -> None:
        """The host is as it was: a second run on it starts from nothing, and frees nothing twice."""
        for role in (STUDENT, EMA, CRITIC):
            self.host.denoiser.roles.drop(role)

    def _trainer(self, prompts: Prompts) -> Trainer:
        host, settings, method = self.host, self.settings, METHODS[self.settings.method]
        roles, objective = host.denoiser.roles, method(settings)
        add_student(host, settings, method, self.initial)
        roles.copy(STUDENT, EMA)
        if objective is not None:
            roles.add(CRITIC, settings.critic_rank or settings.rank, settings.seed, host.device)
            self._share_start()
        pairs = Pairs(host, prompts, settings, self.run.folder / "pairs")
        direct = None if method.direct is None else method.direct(host, settings, prompts, self.run.folder)
        return Trainer(host, settings, method.recipe(host, settings), prompts, pairs, objective, direct)

    @torch.no_grad()
    def _share_start(self) -> None:
        """A critic of the student's rank starts from the student's A, an initial LoRA's too, and from B = 0."""
        roles = self.host.denoiser.roles
        for name, (a, _) in roles.state(CRITIC).items():
            start = roles.state(STUDENT)[name][0]
            if start.shape == a.shape:
                a.copy_(start)

    def _train(self) -> None:
        total = self.trainer.total
        if self.update == 0:
            self._begin()
        while self.update < total:
            began = time.monotonic()
            phase = self.trainer.phase(self.update)[0]
            numbers = self.trainer.step(self.update)
            if self.trainer.stuck >= self.settings.patience:
                self._roll_back()
            seen, preview = self.looks(self.update + 1, last=self.update + 1 == total)
            numbers |= seen
            self.run.log({"update": self.update + 1, "phase": phase, "seconds": time.monotonic() - began, **numbers})
            self.update += 1
            self._save_if_due()
            if self.report(self._progress(phase, numbers, preview)):
                self.trainer.notes.append(f"finished early, after {self.update} of {total} updates")
                return

    def _begin(self) -> None:
        """Measure and show the untrained student, once in a run: where its curve begins."""
        known = [line["distance"] for line in self.run.metrics() if line["update"] == 0]
        if known:  # killed since, before its second state
            self.looks.gain(0, math.nan if known[0] is None else known[0])
            return
        began = time.monotonic()
        numbers, preview = self.looks(0, last=False)
        if numbers:
            self.run.log({"update": 0, "phase": BEFORE, "seconds": time.monotonic() - began, **numbers})
        if numbers or preview:
            self.report(self._progress(BEFORE, numbers, preview))

    def _progress(self, phase: str, numbers: Numbers, preview: Path | None) -> Progress:
        done, left = self._cost(0, self.update), self._cost(self.update, self.trainer.total)
        seconds = self.seconds_before + time.monotonic() - self.started
        eta = seconds * left / done if done else math.nan
        return Progress(self.update, self.trainer.total, phase, seconds, eta, numbers, self._all_notes(), preview)

    def _all_notes(self) -> tuple[str, ...]:
        """What this process has to say, which is not saved, then what the run has."""
        return tuple(dict.fromkeys([*self.notes, *self.trainer.notes]))

    def _cost(self, first: int, last: int) -> float:
        """Updates ``first`` to ``last`` in forwards of one sample: 3 a backward pass, 1 a forward without."""
        per = {"warm start": 3.0, "regression": 3.0, "critic": 4.0}
        full = 4.0 * self.settings.critic_updates + 6.0
        at, cost = 0, 0.0
        for name, length in self.trainer.phases:
            overlap = max(0, min(last, at + length) - max(first, at))
            cost, at = cost + overlap * per.get(name, full), at + length
        return cost

    # -- states -------------------------------------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        """Every so often, at the end, and where the watch has just found the best so far."""
        late = time.monotonic() - self.saved_at > 60
        best = self.looks.best is not None and self.looks.best["update"] == self.update
        if late or best or self.update % self.settings.save_every == 0 or self.update == self.trainer.total:
            self._save()

    def _save(self) -> None:
        tensors, notes = snapshot(self.trainer)
        seconds = self.seconds_before + time.monotonic() - self.started
        best = self.looks.best
        notes |= {"update": self.update, "best": best, "elapsed": seconds}
        # nothing is learnt in the untrained state: where that is the best so far, none is kept as the best
        kept = int(best["update"]) if best else 0
        self.run.save(self.update, tensors, notes, kept or None)
        self.saved_at = time.monotonic()

    def _restore(self) -> None:
        tensors, notes = self.run.load_last()
        restore(self.trainer, tensors, notes)
        self.update, self.looks.best, self.seconds_before = notes["update"], notes["best"], notes["elapsed"]
        self.run.forget_after(self.update)

    def _adjust(self) -> None:
        """Where the run is to go on with other numbers, they are its own from here on."""
        if not self.run.changes:
            return
        if self.update > self.trainer.total:
            raise OneStepError(
                f"the run in {self.run.folder} has done {self.update} updates, more than the {self.trainer.total} that "
                "it would have now: raise steps, or restart it"
            )
        self.trainer.notes.append(f"went on after {self.update} updates with {self.run.adjust()}")
        self._save()

    def _roll_back(self) -> None:
        reason = (
            f"{self.trainer.stuck} steps in a row were no numbers (loss or gradient), "
            f"the last in update {self.update + 1}"
        )
        self._restore()
        raise Stopped(
            f"{reason}: back at the state after update {self.update}. "
            "Lower learning_rate or matching_guidance, then restart"
        )

    def _leave(self, error: BaseException) -> None:
        """Cancelled or failed: the state as it stands between two turns, and what has been learnt, as a file."""
        if isinstance(error, OneStepError) and not isinstance(error, Stopped):
            return
        if self.update and self.trainer.whole and not self.trainer.stuck:
            self._save()
            self._write("partial.safetensors", self.looks.shown)

    # -- the file -----------------------------------------------------------------------------------------------------

    def _finish(self) -> Result:
        self._save()
        role = self.looks.better()
        path, check = self._write("result.safetensors", role)
        (self.run.folder / "partial.safetensors").unlink(missing_ok=True)
        preview = self.looks.last_preview(self.update)
        seconds = self.seconds_before + time.monotonic() - self.started
        return Result(
            path=path,
            recipe=self.trainer.recipe,
            metrics=self.run.metrics(),
            run=self.run.folder,
            role=role,
            check=check,
            updates=self.update,
            seconds=seconds,
            notes=self._all_notes(),
            preview=preview,
        )

    def _write(self, name: str, role: str) -> tuple[Path, str]:
        """The result and what its load-back proved: the role's side where it has one, else its factors as a LoRA."""
        path, roles, family = self.run.folder / name, self.host.denoiser.roles, self.host.family
        recipe = self.trainer.recipe.to_json()
        if role in roles.sides:
            save_adapter(path, roles.sides[role], family, self._header(role) | {"onestep.recipe": recipe})
            return path, check_adapter(path, roles.sides[role], family)
        save_lora(path, roles.state(role), family, recipe, self._header(role))
        return path, self.host.check_file(path)

    def _header(self, role: str) -> dict[str, str]:
        settings = self.settings
        header = {
            "onestep.settings": settings.to_json(),
            "onestep.role": role,
            "onestep.base": self.host.base_hash,
            "ss_base_model_version": self.host.family,
            "ss_sd_model_name": self.host.name,
            "ss_steps": str(self.update),
            "ss_learning_rate": str(settings.learning_rate),
            "ss_seed": str(settings.seed),
            "modelspec.title": self.run.folder.name,
            "modelspec.resolution": settings.sizes.split(",")[0].strip(),
        }
        return header | ({"onestep.prompts": json.dumps(self.texts)} if settings.keep_prompts else {})
