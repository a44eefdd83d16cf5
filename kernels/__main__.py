"""python -m onestep.kernels: which implementation serves each op here; with `build`, compile those in CUDA C++."""

from __future__ import annotations

import argparse
import sys

from .compile_cuda import BuildError, build
from .ops import states


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m onestep.kernels", description=__doc__)
    parser.add_argument("action", nargs="?", choices=["show", "build"], default="show")
    parser.add_argument("--arch", action="append", default=[], help="compute capability without its dot, as 86")
    given = parser.parse_args()
    try:
        if given.action == "build":
            print(f"built {build(given.arch)}")
    except BuildError as trouble:
        print(trouble, file=sys.stderr)
        return 2
    for name, state in states().items():
        print(f"{name:<20}{state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
