"""diffusers and transformers without their progress bars and advice, while they do our errands."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


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
