"""Every Triton kernel compiles for the cards that people have, which need not be here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "compile_for_card.py"
START = """
import importlib.util, runpy, sys
root, script = sys.argv[1:3]
spec = importlib.util.spec_from_file_location("onestep", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["onestep"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.argv = [script, sys.argv[3]]
runpy.run_path(script, run_name="__main__")
"""
LEAST_SHARED = 99 * 1024
"""Bytes that a block of threads has on any card from Ampere on."""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 90])
def test_it_compiles_and_fits(capability: int, root: Path, tmp_path: Path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: `make test-kernels` installs and tests it")
    surroundings = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    surroundings.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", START, str(root), str(SCRIPT), str(capability)],
        env=surroundings,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 9
    assert all(entry["bytes"] > 1000 and entry["shared"] <= LEAST_SHARED for entry in found.values()), found
