"""The `onestep` command: 0 where all went well, 1 for a run that failed or was cancelled, 2 for bad input."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from ..core.errors import OneStepError
from .console import RunFailed, complain, console
from .parser import parse

FAILED, BAD_INPUT = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    _hush()
    try:
        args = parse(words)
        with console(getattr(args, "json", None) in (True, "-")) as told:
            # Imported only now: --help and a mistyped command need no torch.
            return importlib.import_module(f".{args.command}", __package__).run(args, told) or 0
    except SystemExit as exit:  # argparse, after --help
        return int(exit.code or 0)
    except KeyboardInterrupt as cancelled:
        complain(str(cancelled) or "cancelled; nothing was written")
        return FAILED
    except Exception as error:
        return _failed(error, "--debug" in words)


def _hush() -> None:
    """The libraries' advice to programmers is not for whoever types a command; nor may they look for a network."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")


def _failed(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    if isinstance(error, OneStepError):
        complain(str(error))
        return FAILED if isinstance(error, RunFailed) else BAD_INPUT
    if isinstance(error, BrokenPipeError):  # `onestep ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    complain(f"{_kind(error)}: {error}. Run it again with --debug for the whole trace")
    return FAILED


def _kind(error: Exception) -> str:
    return "out of memory" if type(error).__name__ == "OutOfMemoryError" else f"failed with {type(error).__name__}"


if __name__ == "__main__":
    sys.exit(main())
