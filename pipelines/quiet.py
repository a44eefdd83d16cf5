"""diffusers and transformers without their progress bars, advice and long tracebacks, while they do our errands."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ..core.errors import OneStepError

LIBRARIES = (diffusers_logging, transformers_logging)

_GUARD = threading.Lock()
_BEFORE: list[Any] = []  # of each `quiet` that runs, in any thread, one entry; the first holds what to go back to


@contextmanager
def quiet() -> Iterator[None]:
    """Within, both libraries report errors alone; after the last of these, in any thread, what they did before."""
    with _GUARD:
        _BEFORE.append(None if _BEFORE else _silenced())
    try:
        yield
    finally:
        with _GUARD:
            if len(_BEFORE) == 1:
                _restored(*_BEFORE[0])
                _BEFORE.clear()
            else:
                _BEFORE.pop()


def _silenced() -> tuple[list[Any], list[Any], Any]:
    # older diffusers cannot be asked
    bars = [getattr(library, "is_progress_bar_enabled", lambda: True)() for library in LIBRARIES]
    verbosities, caught = [library.get_verbosity() for library in LIBRARIES], warnings.catch_warnings()
    for library in LIBRARIES:
        library.set_verbosity_error()
        library.disable_progress_bar()
    caught.__enter__()
    # diffusers renames its arguments; the old names serve old and new versions
    warnings.simplefilter("ignore", FutureWarning)
    return bars, verbosities, caught


def _restored(bars: list[Any], verbosities: list[Any], caught: Any) -> None:
    for library, verbosity, shown in zip(LIBRARIES, verbosities, bars, strict=True):
        library.set_verbosity(verbosity)
        if shown:
            library.enable_progress_bar()
    caught.__exit__(None, None, None)


def attempt(path: Path, loading: Callable[[], Any]) -> Any:
    """``loading()``, quietly; what it raises becomes one line for a person."""
    try:
        with quiet():
            return loading()
    except OneStepError:
        raise
    except Exception as error:
        why = (str(error).strip().splitlines() or [""])[0][:180]
        raise OneStepError(f"{path.name[:80]} cannot be loaded; is it whole? {type(error).__name__}: {why}") from error
