"""distill --whole: a LoRA against the unquantised base, and what is refused before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_folders
from command import SHORT, Command


@pytest.mark.broad
def test_a_finished_run_is_checked_when_it_is_asked_to(
    onestep: Command, model: Path, prompts: Path, trained: Path, tmp_path: Path
) -> None:
    """On the same base the LoRA is what it was; a plain base has nothing to say of itself."""
    shutil.copytree(trained, tmp_path / "run")
    words = ["distill", model, "--prompts", prompts, "--out", tmp_path / "run", "--resume", *SHORT]
    said = onestep(*words, "--whole", model)
    assert said.code == 0, said.err
    assert "the student's predictions differ by 0.0%, the base's own by 0.0%" in said.err
    assert "unquantised" not in onestep(*words).err


@pytest.mark.parametrize(
    ("whole", "more", "word"),
    [
        ("other widths", [], "of another architecture than tiny: give the same base, unquantised"),
        ("other family", [], "of another architecture than tiny: give the same base, unquantised"),
        ("not there", [], "no model"),
        ("sdxl", [], "no model 'sdxl'"),  # a layout, which has no weights
        ("itself", ["--method", "agd"], "--whole checks a LoRA, and agd makes an adapter"),
    ],
)
def test_what_cannot_be_checked_is_refused_before_anything_is_trained(
    whole: str, more: list[str], word: str, onestep: Command, model: Path, prompts: Path, tmp_path: Path
) -> None:
    made = {"other widths": lambda path: tiny_folders.unet_folder(path, widths=(32, 64)), "itself": lambda path: model}
    made |= {"other family": tiny_folders.sd3_folder}
    other = made[whole](tmp_path / "other") if whole in made else whole
    run = tmp_path / "run"
    said = onestep("distill", model, "--prompts", prompts, "--out", run, "--whole", other, *SHORT, *more)
    assert said.code == 2 and word in said.message and not run.exists(), said
