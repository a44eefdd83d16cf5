"""python -m onestep: the command, for torchrun and accelerate, which start a module."""

from __future__ import annotations

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
