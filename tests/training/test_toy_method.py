"""One new file is one new method: the command, the settings and the table know it; it trains, is killed and goes on."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_host import NAMES, SmallHost, small
from whole_runs import Cancelled, at_call, left, run

from onestep.cli.main import main
from onestep.core.errors import OneStepError
from onestep.core.lora_file import load_lora
from onestep.core.tensor_file import read_header
from onestep.training import methods
from onestep.training.methods import METHODS, settings_for
from onestep.training.presets import preset

FILE = Path(__file__).parents[1] / "support" / "toy_method.py"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toy's file in a folder on the package's path, and gone again."""
    folder = tmp_path / "methods"
    folder.mkdir()
    shutil.copy(FILE, folder / "toy.py")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    yield
    import sys

    sys.modules.pop("onestep.training.methods.toy", None)


def quiet(**changes: object) -> dict[str, object]:
    return {"method": "toy", "steps": 4, "watch_every": 2, "preview_every": 4, "warm_up": 1, **changes}


def test_nothing_knows_it_without_its_file() -> None:
    assert "toy" not in METHODS and list(METHODS)[0] == "dmd"
    with pytest.raises(OneStepError, match="no method 'toy'"):
        settings_for("toy")


def test_settings_presets_and_commands_know_it(toy: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert "toy" in METHODS and settings_for("toy", loudness=2).own.loudness == 2
    with pytest.raises(OneStepError, match="loudness is 11: it must lie in 0 to 10"):
        settings_for("toy", loudness=11)
    with pytest.raises(OneStepError, match="dmd has no setting 'loudness': it belongs to toy"):
        settings_for("dmd", loudness=2)
    assert preset("Best", method="toy").steps == 3000
    assert main(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["toy"] == {
        "name": "toy",
        "title": "A louder teacher",
        "paper": "none",
        "forwards": "4",
        "makes": "LoRA",
    }
    assert main(["distill", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "of toy alone: loudness What the student's answer is, in units of its teacher's. [1.5; 0..10]" in told


def test_it_trains_and_saves(toy: None, tmp_path: Path) -> None:
    result = run(tmp_path / "run", small(**quiet(loudness=3.0)))  # type: ignore[arg-type]
    assert set(load_lora(result.path).state) == set(NAMES.values())
    settings = json.loads(read_header(result.path).metadata["onestep.settings"])
    assert (settings["method"], settings["loudness"]) == ("toy", 3.0) and "critic_updates" not in settings
    losses = [line["loss"] for line in result.metrics if "loss" in line]
    assert len(losses) == 4 and all(line["phase"] == "toy" for line in result.metrics[1:])


@pytest.mark.parametrize("poll", [2, 5, 7])
def test_it_is_cut_and_goes_on_to_the_same_end(toy: None, tmp_path: Path, poll: int) -> None:
    settings = small(**quiet(accumulation=2))  # type: ignore[arg-type]
    run(tmp_path / "whole" / "run", settings)
    with pytest.raises(Cancelled):
        run(tmp_path / "run", settings, host=SmallHost(on_poll=at_call(poll, Cancelled())))
    run(tmp_path / "run", settings, existing="continue")
    assert left(tmp_path / "run") == left(tmp_path / "whole" / "run")


@pytest.mark.parametrize("room", ["engine", "data", "runs", "watch", "evaluation"])
def test_only_the_methods_know_the_methods(room: str) -> None:
    """No other room imports one or compares with its name; the engine's words do not even speak of one."""
    for path in (Path(methods.__file__).parents[1] / room).glob("*.py"):
        source = path.read_text("utf-8")
        tree = ast.parse(source)
        modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not any("methods" in module.split(".") for module in modules), path
        values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert not set(METHODS) & {value for value in values if isinstance(value, str)}, path
        if room == "engine":
            assert re.findall(rf"\b(?:{'|'.join(METHODS)})\b", source) == [], path
