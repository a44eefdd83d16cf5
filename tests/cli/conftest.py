"""The command line in this process, a tiny model on disk, and one short real run for the tests that need a LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_folders
from command import SHORT, Command, Said

from onestep.cli.main import main


@pytest.fixture
def onestep(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `onestep WORDS...`."""

    def run(*words: object) -> Said:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder in `tiny`'s layout with random weights."""
    return tiny_folders.unet_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("red dragon\n\nblue wall\nred wall\n")
    return file


@pytest.fixture(scope="session")
def trained(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole, short run."""
    run = tmp_path_factory.mktemp("runs") / "short"
    assert main(["distill", str(model), "--prompts", str(prompts), "--out", str(run), *SHORT]) == 0
    return run
