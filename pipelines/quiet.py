"""diffusers and transformers without their progress bars, advice and long tracebacks, while they do our errands."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ..core.errors import OneStepError


@contextmanager
def quiet() -> Iterator[None]:
    """Within, both libraries report errors alone; afterwards what they were told before."""
    libraries = (diffusers_logging, transformers_logging)
    # older diffusers cannot be asked
    bars = [getattr(library, "is_progress_bar_enabled", lambda: True)() for library in libraries]
    verbosities = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # diffusers renames its arguments; the old names serve old and new versions
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library, verbosity, shown in zip(libraries, verbosities, bars, strict=True):
            library.set_verbosity(verbosity)
            if shown:
                library.enable_progress_bar()


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
