"""A whole distillation: from a host, prompts and settings to a checked LoRA file, resumable at any instant."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..core.errors import OneStepError
from ..core.ksampler import usage_hint
from ..core.memory import OutOfMemory, noticed
from .engine import processes
from .engine.donor import Initial, initial_state
from .engine.inputs import check_base
from .engine.noise_range import ended, within_range
from .engine.optimizer import refuse_missing
from .engine.prompts import check_prompts
from .engine.setup import Setup, as_before
from .engine.student import STUDENT, add_student, mean_device
from .engine.trainer import EMA, Trainer
from .engine.turns import Numbers
from .host import Host, Shells
from .methods import METHODS
from .plan.run import laid_out
from .runs import candidates
from .runs.config import config_of, first_notes
from .runs.made import Writer
from .runs.run import CONTINUE, STOP, NotSaved, Run, leave
from .runs.shared_run import entered
from .runs.state import restore, size_of, snapshot
from .runs.threads import threads_of
from .settings import Settings
from .watch.combination import searched
from .watch.eta import Pace, length_told
from .watch.monitor import watching
from .watch.progress import Progress, Report, Request, Result, Stopped, requested

__all__ = ["Progress", "Report", "Request", "Result", "Stopped", "distil"]

SAVE_SECONDS = 600.0
BEFORE = "before training"  # the phase of the untrained student


def distil(
    host: Host,
    prompts: Sequence[str],
    settings: Settings,
    folder: str | Path,
    *,
    existing: str = STOP,
    report: Report | None = None,
    shells: Shells | None = None,
    train: bool = True,
    origin: Mapping[str, str] | None = None,
) -> Result:
    """Distil ``host``'s checkpoint on ``prompts`` into ``folder``/result.safetensors.

    existing: "continue", "restart" or "stop" where the folder already holds a run. One that is continued may be given
    other ``steps`` and ``pairs`` (sun: ``steps``); what changes over a run, the step size and nct's noise levels, is
    then as in a run of so many. One finished early counts as finished until it is given other steps. shells: of
    ``host``; on a card the run is then fitted to it, and says how. train: without, a run that is there makes no update
    and chooses its result anew. origin: of its parts, for its config. Raises OneStepError for bad input, before it has
    written anything, and Stopped for a run that failed. What ``host.poll`` or ``report`` raises passes through, after
    the state and partial.safetensors are saved.
    """
    prompts, folder = check_prompts(prompts), Path(folder).expanduser()
    if not (train or Run(folder).states()):
        raise OneStepError(f"there is no run in {folder} whose result could be chosen: train one first")
    with within_range(host, settings):
        method = METHODS[settings.method]
        initial = initial_state(host, settings, method.recipe)
        check_base(host, settings)
        method.check_all(host, settings, existing == CONTINUE and bool(Run(folder).states()), prompts)
        refuse_missing(settings)
        config = config_of(host, prompts, settings, ended(host, settings, method.recipe(host, settings)))
        config |= {"origin": dict(origin)} if origin else {}
        # whatever the caller switched off around us: a run needs gradients
        run_there = entered(folder, config, host.device, existing, method.adjustable)
        with torch.inference_mode(False), torch.enable_grad(), run_there as (run, goes_on):
            return _Session(host, prompts, run.as_begun(settings), run, report, initial, shells).run_all(goes_on, train)


class _Session:
    """One process's part of a run."""

    def __init__(
        self,
        host: Host,
        prompts: list[str],
        settings: Settings,
        run: Run,
        report: Report | None,
        initial: Initial,
        shells: Shells | None,
    ) -> None:
        self.host, self.settings, self.run, self.method = host, settings, run, METHODS[settings.method]
        self.report: Callable[[Progress], Any] = (processes.is_first() and report) or (lambda progress: None)
        self.texts, self.shells, (self.initial, taken) = prompts, shells, initial
        recipe = ended(host, settings, self.method.recipe(host, settings))
        usage = "" if self.method.makes == "adapter" else usage_hint(recipe, host.denoiser.schedule)
        self.write = Writer(host, prompts, settings, run.folder, recipe, usage)
        self.notes = [*first_notes(host, settings), *filter(None, (self.method.note(settings), taken, usage))]
        self.started, self.seconds_before = time.monotonic(), 0.0
        self.update, self.saved_at, self.finished_at, self.saved = 0, time.monotonic(), 0, (-1, 0)

    # -- the run ------------------------------------------------------------------------------------------------------

    def run_all(self, goes_on: bool, train: bool) -> Result:
        with ExitStack() as stack:
            self.layout = laid_out(self.run, self.host, self.settings, self.shells, len(self.texts))
            self.host.memory_required, self.notes = self.layout.beyond, [*self.layout.notes, *self.notes]
            stack.enter_context(noticed(self.notes))
            self.setup = self._setup()
            stack.enter_context(self.layout.training(self.host))
            with processes.first_alone():
                self.notes += stack.enter_context(threads_of(self.run, self.setup, goes_on))
            stack.enter_context(as_before(self.host, self.settings))
            self.checkpoints = stack.enter_context(self.layout.hooked(self.host))
            self.trainer = self._trainer()
            self.pace, self.monitor = Pace(*self.layout.counted(self.trainer.plan)), watching(self.setup)
            self.notes.append(length_told(self.trainer.plan, self.settings.batch))
            beside = self.layout.disk + candidates.size_of(self.host.denoiser.roles, EMA, self.settings)
            self.notes += self.run.short_of_room(size_of(self.trainer), beside)
            if goes_on:
                self._restore()
                self._adjust()
            else:
                self._save()
            try:
                self.monitor.prepare(self.setup, self.method.reference, self._tick)
                if train:
                    self._train()
            except BaseException as error:
                self._leave(error)
                raise
            return self._finish()

    def _setup(self) -> Setup:
        host, settings, folder = self.host, self.settings, self.run.folder
        with processes.first_alone():
            prompts = self.method.embedded(host, self.texts, settings, folder / "embeddings", self._tick)
        return Setup(host, settings, prompts, folder, self.method.recipe(host, settings))

    def _trainer(self) -> Trainer:
        add_student(self.host, self.settings, self.initial, self.method.adapter)
        self.host.denoiser.roles.copy(STUDENT, EMA, mean_device(self.host.device))
        plan = self.method.plan(self.setup)
        trainer = Trainer(self.host, self.settings, self.setup.recipe, self.setup.prompts, plan)
        self.layout.place(trainer, self.checkpoints)
        return trainer

    def _train(self) -> None:
        total = self.trainer.plan.updates
        if self.update == 0:
            self._begin()
        while self.update < total and self.finished_at != total:
            began = time.monotonic()
            phase = self.trainer.plan.at(self.update)[0]
            found = self.trainer.step(self.update)
            if self.trainer.stuck >= self.settings.patience:
                self._roll_back()
            self.notes += self.pace.add(self.update, time.monotonic() - began)
            seen, preview = self.monitor(self.update + 1, self.update + 1 == total, phase.teaches(STUDENT))
            found |= seen
            self.run.log({"update": self.update + 1, "phase": phase.name, "seconds": time.monotonic() - began, **found})
            self.update += 1
            self.monitor.keep(self.update)
            self._save_if_due()
            if Request.FINISH in self._answer(phase.name, found, preview):
                self.finished_at = total
                self.trainer.notes.append(f"finished early, after {self.update} of {total} updates")

    def _answer(self, phase: str, numbers: Numbers, preview: Path | None) -> Request:
        """Report an update, and do what is asked for now."""
        asked = Request(processes.same(requested(self.report(self._progress(phase, numbers, preview))).value))
        if Request.SAVE in asked:
            self._save()
            self._write_partial()
        if Request.SAMPLE in asked:
            self.report(self._progress(phase, {}, self.monitor.preview(self.update)))
        return asked

    def _begin(self) -> None:
        """Measure and show the untrained student, once in a run: where its curve begins."""
        known = [line["distance"] for line in self.run.metrics() if line["update"] == 0]
        if known:  # killed since, before its second state
            self.monitor.gain(0, math.nan if known[0] is None else known[0])
            return
        began = time.monotonic()
        numbers, preview = self.monitor(0, last=False)
        if numbers:
            self.run.log({"update": 0, "phase": BEFORE, "seconds": time.monotonic() - began, **numbers})
        if numbers or preview:
            self.report(self._progress(BEFORE, numbers, preview))

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _tick(self, phase: str, done: int, of: int) -> None:
        """Work before the first update, or before the first of this process."""
        total = self.trainer.plan.updates if hasattr(self, "trainer") else 0
        self.report(Progress(self.update, total, phase, done, of, self._seconds(), math.nan, {}, self._all_notes()))

    def _progress(self, phase: str, numbers: Numbers, preview: Path | None) -> Progress:
        total = self.trainer.plan.updates
        eta, notes = self.pace.left(self.update), self._all_notes()
        return Progress(self.update, total, phase, self.update, total, self._seconds(), eta, numbers, notes, preview)

    def _all_notes(self) -> tuple[str, ...]:
        """What this process has to say, which is not saved, then what the run has."""
        trained = self.trainer.notes if hasattr(self, "trainer") else []
        return tuple(dict.fromkeys([*self.notes, *trained]))

    # -- states -------------------------------------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        """At the end, every ten minutes, and where a number of updates is asked for, after these and at the best."""
        late, every = time.monotonic() - self.saved_at > SAVE_SECONDS, self.settings.save_every
        best = self.monitor.best is not None and self.monitor.best["update"] == self.update
        asked = bool(every) and (best or self.update % every == 0)
        if late or asked or self.update == self.trainer.plan.updates:
            self._save()

    def _save(self) -> None:
        tensors, notes = snapshot(self.trainer)
        best = self.monitor.best
        notes |= {"update": self.update, "best": best, "elapsed": self._seconds(), "finished_at": self.finished_at}
        # nothing is learnt in the untrained state: where that is the best so far, none is kept as the best
        kept = int(best["update"]) if best else 0
        self.run.save(self.update, tensors, notes, kept or None)
        self.saved_at, self.saved = time.monotonic(), (self.update, self.finished_at)

    def _restore(self) -> None:
        tensors, notes = self.run.load_last()
        restore(self.trainer, tensors, notes)
        self.update, self.monitor.best, self.seconds_before = notes["update"], notes["best"], notes["elapsed"]
        self.finished_at = notes.get("finished_at", 0)
        self.run.forget_after(self.update)

    def _adjust(self) -> None:
        """Where the run is to go on with other numbers, they are its own from here on."""
        if not self.run.changes:
            return
        if self.update > self.trainer.plan.updates:
            raise OneStepError(
                f"the run {self.run.folder.name[:80]} has done {self.update} updates, more than the "
                f"{self.trainer.plan.updates} that it would have now: raise steps, or restart it"
            )
        self.finished_at = 0
        self.trainer.notes.append(f"went on after {self.update} updates with {self.run.adjust()}")
        self._save()

    def _roll_back(self) -> None:
        bad, update = self.trainer.stuck, self.update + 1
        self._restore()
        raise Stopped(
            f"{bad} steps in a row were no numbers (loss or gradient), the last in update {update}: back at the state "
            f"after update {self.update}. {self.trainer.remedy}"
        )

    def _leave(self, error: BaseException) -> None:
        """Cancelled or failed: the state as it stands between two turns, and what has been learnt, as a file."""
        given = isinstance(error, OneStepError)
        if given and not isinstance(error, Stopped | NotSaved | OutOfMemory | processes.Alone):
            return
        if self.update and self.trainer.whole and not self.trainer.stuck:
            leave(error, self._save, self._write_partial)

    def _write_partial(self) -> None:
        self.write("partial.safetensors", self.monitor.shown, self.update)

    # -- the file -----------------------------------------------------------------------------------------------------

    def _finish(self) -> Result:
        if self.saved != (self.update, self.finished_at):
            self._save()
        with searched(self.monitor, self.settings, self.update, self._tick) as choice:
            path, check = self.write("result.safetensors", choice.role, choice.update, choice.told)
        self.notes += [choice.note] if choice.note else []
        for partial in self.run.folder.glob("partial*.safetensors"):
            partial.unlink(missing_ok=True)
        processes.wait()
        return Result(
            path=path,
            recipe=self.write.made(path.name),
            metrics=self.run.metrics(),
            run=self.run.folder,
            role=choice.role,
            check=check,
            updates=self.update,
            seconds=self._seconds(),
            notes=self._all_notes(),
            preview=choice.preview or (self.monitor.preview(self.update) if self.settings.preview_every else None),
        )
