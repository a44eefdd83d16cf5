"""`onestep.distill`, killed and called again, ends as if nothing had been, to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import distil_runner
import pytest
import tiny_folders
import tiny_krea2
import tiny_lumina2
import tiny_pixart
import torch
from narrowed import narrowed
from tiny_pipelines import video_vae

from onestep.core.lora_file import load_lora
from onestep.training.runs.run import Run

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
FOLDERS = {
    "sd3": tiny_folders.sd3_folder,
    "klein": tiny_folders.klein_folder,
    "z_image": tiny_folders.z_image_folder,
    "krea2": lambda folder: tiny_krea2.krea2_folder(folder, video_vae()),
    "lumina2": lambda folder: tiny_lumina2.lumina2_folder(folder, tiny_folders.autoencoder(0.8, 0.1, plain=True)),
    "wan": tiny_folders.wan_folder,
    "pixart": tiny_pixart.pixart_folder,
}
SIZES = {"pixart": "40x40"}
"""Where it is not 32x32."""


@pytest.mark.parametrize("name", narrowed(FOLDERS))
def test_a_killed_run_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    model, out, sizes = FOLDERS[name](tmp_path / "model"), tmp_path / "cut", SIZES.get(name, "32x32")
    whole = distil_runner.ran(model, tmp_path / "whole", sizes).path
    told = [str(model), str(out), "2", str(torch.get_num_threads()), sizes]
    done = subprocess.run([sys.executable, str(Path(distil_runner.__file__)), *told], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert Run(out).metrics()[-1]["update"] >= 2 and not (out / "result.safetensors").exists()
    found, wanted = (load_lora(path).state for path in (distil_runner.ran(model, out, sizes).path, whole))
    assert found.keys() == wanted.keys()
    for layer, factors in wanted.items():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[layer], factors, strict=True)), layer
