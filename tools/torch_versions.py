"""Which versions of torch OneStep works with: an environment for each, and in it the tests that torch's changes break.

    python tools/torch_versions.py                      # 2.6.0, 2.8.0 and the one that `make test` has
    python tools/torch_versions.py 2.7.1 --keep /tmp/torch

Takes 5 to 7 GB of disk a version where the package index has only builds for CUDA, which compute on a CPU as well, and
some minutes of one core. Prints a table; exits 1 where a test failed or an environment could not be made.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("2.6.0", "2.8.0", "2.13.0")
"""diffusers 0.39 to 0.42 ask for 2.6 or newer, transformers 5 too; ComfyUI 0.33's README calls 2.7 the least."""
BESIDE = ("diffusers>=0.39.0", "peft>=0.18.0", "transformers", "accelerate", "bitsandbytes", "hypothesis", "pytest")
TESTS = {
    "checkpointing": ["tests/core/test_checkpoint.py", "tests/core/test_checkpoint_surroundings.py"],
    "roles": ["tests/core/test_roles.py", "tests/core/test_factors.py"],
    "optimiser": ["tests/training/test_optimizer_states.py", "tests/training/test_muon.py"],
    "run and resume": ["tests/training/test_distil.py"],
    "diffusers": ["tests/pipelines/test_distill.py", "tests/pipelines/test_adapt_gradients.py"],
}


@dataclass(frozen=True)
class Row:
    """What one version of torch gave: its full name, then a cell for each of TESTS."""

    torch: str
    cells: list[str]
    good: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="of torch, like 2.8.0")
    parser.add_argument("--keep", type=Path, help="make the environments here and leave them for the next time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as passing:
        rows = [tried(version, (args.keep or Path(passing)) / f"torch-{version}") for version in args.versions]
    print("\n".join(table(rows)))
    return 0 if all(row.good for row in rows) else 1


def tried(version: str, folder: Path) -> Row:
    """The tests of TESTS in an environment of ``version``, made where it is not there yet."""
    python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    if not (folder / "ready").is_file():
        done = make(version, folder, python)
        if done is not None:
            return Row(version, [done, *[""] * (len(TESTS) - 1)], False)
    code = "import torch; print(torch.__version__)"
    full = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    cells = [ran(python, files) for files in TESTS.values()]
    return Row(full, [text for text, _ in cells], all(good for _, good in cells))


def make(version: str, folder: Path, python: str) -> str | None:
    """None, or why there is no such environment."""
    say(f"torch {version}: an environment in {folder}")
    install = ["-m", "pip", "install", "--quiet", "--no-cache-dir", f"torch=={version}"]
    for command in ([sys.executable, "-m", "venv", str(folder)], [python, *install], [python, *install, *BESIDE]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return "not installed: " + (done.stderr.strip().splitlines() or ["no reason given"])[-1][:100]
    (folder / "ready").touch()
    return None


def ran(python: str, files: list[str]) -> tuple[str, bool]:
    """ "30 passed in 12 s", and whether all is well."""
    began, environment = time.monotonic(), {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", done.stdout.strip().splitlines()[-1])
    if done.returncode:
        say(done.stdout[-6000:])
    return f"{', '.join(found) or 'nothing ran'}, {time.monotonic() - began:.0f} s", done.returncode == 0


def table(rows: list[Row]) -> list[str]:
    head = ["torch", *TESTS]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join([row.torch, *row.cells])} |" for row in rows]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
