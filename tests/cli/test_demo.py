"""The demo on the bundled model, much shortened: it ends with a picture, a table and a LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Command
from PIL import Image

from onestep.cli.demo import GOAL, settings_of
from onestep.cli.model import read_prompts
from onestep.cli.parser import parse
from onestep.core.errors import OneStepError
from onestep.pipelines.bundled import path_of
from onestep.training.presets import PRESETS


def is_bundled() -> bool:
    try:
        return (path_of("tiny") / "model_index.json").is_file() and (path_of("judge") / "judge.json").is_file()
    except OneStepError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not is_bundled(), reason="this checkout holds no tiny model")
def test_a_short_demo(onestep: Command, tmp_path):
    run = tmp_path / "demo"
    said = onestep("demo", "--out", run, "--steps", 1, "--samples", 4, "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert [row["name"] for row in told["table"]["rows"]][-1] == "result.safetensors"
    assert all("fd" in row["measures"] for row in told["table"]["rows"][1:])
    assert told["share"] > 0 and json.loads((run / "table.json").read_text()) == told["table"]
    width, height = Image.open(run / "comparison.png").size
    assert width > 4 * 64 and height > 3 * 64


def test_the_demo_is_a_preset_with_fewer_steps():
    settings = settings_of(parse(["demo"]))
    assert settings.method == PRESETS["Balanced"].values["method"]
    assert settings.steps < PRESETS["Balanced"].values["steps"] and 0 < GOAL < 1


def test_its_prompts_are_bundled():
    from onestep.pipelines import bundled

    assert len(read_prompts(str(Path(bundled.__file__).parent / "tiny" / "prompts.txt"))) > 200
