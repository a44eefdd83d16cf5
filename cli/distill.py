"""onestep distill: a checkpoint and prompts to a LoRA, in a run that may be stopped and continued at any time."""

from __future__ import annotations

import math
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..core.errors import OneStepError
from .console import EVERY, Console, RunFailed, Silent, duration, to_go
from .model import at_native_size, open_host, read_prompts, read_settings
from .plan import shell_of

CURVE = ("distance", "content", "variety", "spread")


def run(args: Namespace, console: Console) -> None:
    from ..training.engine.processes import is_first, joined

    with joined(args.device) as args.device:
        try:
            _run(args, console if is_first() else Silent(console.out))
        except KeyboardInterrupt:
            if not is_first():  # the first one says what has become of the run
                raise SystemExit(1) from None
            raise


def _run(args: Namespace, console: Console) -> None:
    from ..training.engine.processes import same

    prompts = read_prompts(args.prompts)
    settings, given = read_settings(args)
    folder, existing = Path(args.out).expanduser(), _existing(args)
    there = same((folder / "config.json").is_file())  # before the first one makes it
    if existing == "stop" and there:
        raise OneStepError(
            f"a run is already in {str(folder)[-200:]}: add --resume or --restart, or give another --out"
        )
    if existing == "continue" and not there:
        console.note(f"no run to continue in {folder.name[:100]}: started anew")
    host = open_host(args.model, settings.targets, args.device, stored=True, waiting=settings.streaming != "off")
    settings = at_native_size(settings, given, host)
    if args.whole is not None:
        _refuse_other(args.whole, host, settings)
    result = train(host, prompts, settings, folder, existing, console, origin=_origin(args, settings))
    for line in storage_lines(host, args.whole, result.path, prompts, settings):
        console.note(line)
    answer(result, console)


def answer(result: Any, console: Console) -> None:
    """What a run has made."""
    console.result(_told(result), _facts(result))


def _origin(args: Namespace, settings: Any) -> dict[str, str]:
    """Where the run's parts lie, for `onestep choose`: bundled models have a name alone."""
    model = Path(args.model).expanduser()
    places = {"model": str(model.resolve()) if model.exists() else args.model, "prompts": _whole_path(args.prompts)}
    return places | ({"initial_lora": _whole_path(settings.initial_lora)} if settings.initial_lora else {})


def _whole_path(name: str) -> str:
    return str(Path(name).expanduser().resolve())


def _refuse_other(whole: str, host: Any, settings: Any) -> None:
    """Before anything is trained: whether its result can be checked on this unquantised base."""
    from ..pipelines.load import located
    from ..training.evaluation.storage import refuse_other
    from ..training.methods import METHODS

    if METHODS[settings.method].makes != "LoRA":
        raise OneStepError(f"--whole checks a LoRA, and {settings.method} makes an adapter: leave --whole out")
    refuse_other(host, shell_of(str(located(whole))).shell(settings.targets))


def storage_lines(host: Any, whole: str | None, lora: Path, prompts: list[str], settings: Any) -> list[str]:
    """How far the student on a quantised base is from that on the whole one."""
    import torch

    from ..core.stored import stored_as
    from ..pipelines.places import is_quantized, place
    from ..training.evaluation.storage import apart, predictions, tried
    from ..training.methods import METHODS

    kind, size = stored_as(host.network), settings.size_list[0]
    if METHODS[settings.method].makes != "LoRA" or not (kind or whole):
        return []
    if whole is None:
        return [f"the base is stored in {kind}: how far it is from the whole one is told by --whole MODEL"]

    def compared() -> str:
        mine = predictions(host, lora, prompts, size)
        if not is_quantized(host.network):
            place(host.network, torch.device("cpu"))  # before the other one takes its room
        other = open_host(whole, settings.targets, str(host.device))
        return apart(mine, predictions(other, lora, prompts, size)).told()

    told, why = tried(compared)
    return [told or why]


def train(
    host: Any,
    prompts: list[str],
    settings: Any,
    folder: Path,
    existing: str,
    console: Console,
    *,
    updates: bool = True,
    origin: dict[str, str] | None = None,
) -> Any:
    """`training.distil.distil` with a progress bar, a curve in text, and a clean end on Ctrl-C. updates: whether any
    are made."""
    from ..pipelines.agreement import read_for
    from ..pipelines.shells import of_host
    from ..training.distil import distil
    from ..training.methods.rewards import given

    shown, shells = Shown(console), partial(of_host, host)
    try:
        with cancellable(host, console), shown:
            how: Any = {"report": shown.report, "shells": shells, "train": updates, "origin": origin}
            with given(read_for(settings)):
                return distil(host, prompts, settings, folder, existing=existing, **how)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_cancelled(folder, shown.updates)) from None
    except OneStepError as error:
        if not shown.updates:
            raise
        raise RunFailed(str(error)) from error


class Shown:
    """Progress as a person sees it: a bar for each phase before the first update and one for the updates, a line for
    each new measure; without a terminal, a line at least every minute."""

    def __init__(self, console: Console) -> None:
        self.console, self.updates, self.notes = console, 0, 0
        self.bar: Any = None
        self.began, self.said_at = "", -math.inf

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._close()

    def report(self, progress: Any) -> None:
        what = progress.phase if progress.preparing else "updates"
        if self.bar is None or what != self.began:
            self._close()
            self.bar, self.began = self.console.bar(progress.of, progress.phase), what
        self.updates, self.bar.n = progress.update, progress.done
        self.bar.set_description(progress.phase, refresh=False)
        self.bar.set_postfix_str(to_go(progress.eta), refresh=True)
        if "distance" in progress.numbers:
            self._say(curve_line(progress))
        elif not self.console.terminal and time.monotonic() - self.said_at >= EVERY:
            self._say(f"{progress.phase}: {progress.done} of {progress.of}; {to_go(progress.eta)}")
        for note in progress.notes[self.notes :]:
            self.console.note(note)
        self.notes = len(progress.notes)

    def _say(self, line: str) -> None:
        self.said_at = time.monotonic()
        self.console.note(line)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None


def curve_line(progress: Any) -> str:
    """update 50/1000, dmd: distance 0.123, content ..., 5 min to go"""
    told = ", ".join(f"{name} {progress.numbers[name]:.3f}" for name in CURVE if name in progress.numbers)
    late = progress.numbers.get("no_gain", 0)
    gain = f"; no gain for {late:.0f} updates" if late else ""
    return f"update {progress.update}/{progress.total}, {progress.phase}: {told}{gain}; {to_go(progress.eta)}"


@contextmanager
def cancellable(host: Any, console: Console) -> Iterator[None]:
    """Within, Ctrl-C (or a polite kill) ends the run between two of its steps; a second one ends it at once. Of several
    processes, each is told twice by one Ctrl-C, by the terminal and by torchrun, which ends them itself where they do
    not."""
    from ..training.engine.processes import Alone, count

    asked, several = threading.Event(), count() > 1

    def ask(number: int, frame: Any) -> None:
        if asked.is_set() and not several:
            raise KeyboardInterrupt
        asked.set()

    def poll() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    signals = [signal.SIGINT, signal.SIGTERM] if threading.current_thread() is threading.main_thread() else []
    before = {number: signal.signal(number, ask) for number in signals}
    host.on_poll = poll
    try:
        yield
    except Alone:
        if not asked.is_set():
            raise
        raise KeyboardInterrupt from None  # the others heard of it first
    finally:
        host.on_poll = None
        for number, handler in before.items():
            signal.signal(number, handler)


def _existing(args: Namespace) -> str:
    return "continue" if args.resume else "restart" if args.restart else "stop"


def _cancelled(folder: Path, updates: int) -> str:
    if not updates:
        return f"cancelled before the first update; start it again with --resume --out {folder}"
    partial = folder / "partial.safetensors"
    kept = f"; what it learnt so far is in {partial}" if partial.is_file() else ""
    return f"cancelled after {updates} updates; the run is saved{kept}. Go on with --resume"


def _told(result: Any) -> str:
    lines = [
        f"{result.path}",
        f"  {result.updates} updates in {duration(result.seconds)}; the file holds the {result.role} weights",
        f"  {result.check}",
        f"  draws in {result.recipe.steps} step{'s' * (result.recipe.steps > 1)}; see: onestep inspect {result.path}",
        *(f"  {note}" for note in result.notes),
    ]
    return "\n".join(lines)


def _facts(result: Any) -> dict[str, Any]:
    import json

    curve = [line for line in result.metrics if "distance" in line]
    return {
        "path": str(result.path),
        "run": str(result.run),
        "role": result.role,
        "updates": result.updates,
        "seconds": round(result.seconds, 3),
        "check": result.check,
        "recipe": json.loads(result.recipe.to_json()),
        "curve": curve,
        "notes": list(result.notes),
    }
