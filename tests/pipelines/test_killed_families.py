"""`onestep.distill` on each family's pipeline: killed by the kernel and run again, it ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_folders

pytest.importorskip("diffusers")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
RUNNER = Path(__file__).parents[1] / "support" / "kill_distill.py"
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "sd3": tiny_folders.sd3_folder,
    "z_image": tiny_folders.z_image_folder,
    "flux2": tiny_folders.klein_folder,
}


def ended(folder: Path, out: Path, deadly: int) -> int:
    ran = subprocess.run(
        [sys.executable, RUNNER, folder, out, str(deadly)], capture_output=True, text=True, timeout=900
    )
    assert ran.returncode in (0, -signal.SIGKILL), ran.stderr[-3000:]
    return ran.returncode


@pytest.mark.broad
@pytest.mark.parametrize("family", FOLDERS)
def test_a_killed_run_ends_as_the_whole_one(family: str, tmp_path: Path) -> None:
    """Before the warm start's second update, and again before the third of matching."""
    folder = FOLDERS[family](tmp_path / "model")
    whole, killed = (tmp_path / name / "run" for name in ("whole", "killed"))
    assert ended(folder, whole, 0) == 0
    assert [ended(folder, killed, deadly) for deadly in (2, 6, 0)] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert (whole / "result.safetensors").read_bytes() == (killed / "result.safetensors").read_bytes()
