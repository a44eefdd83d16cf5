"""In ComfyUI: a streamed model computes what a resident one does, and ComfyUI does not know that it is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from narrowed import narrowed

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("name", narrowed(["sd15", "sd3", "flux"], "sd15", "flux"))
def test_answers_and_gradients_are_the_resident_ones(
    name: str, checkpoints: Path, run_inside: Callable[..., str]
) -> None:
    told = json.loads(run_inside("streamed", checkpoints / f"tiny_{name}.safetensors").strip().splitlines()[-1])
    assert told["same"] and told["finite"] and told["as before"], told
    assert told["resident"] == {"copies": 0, "known to ComfyUI": True}
    assert told["ring"]["copies"] >= told["blocks"] >= 2 and not told["ring"]["known to ComfyUI"]


@pytest.mark.broad
@pytest.mark.parametrize("name", narrowed(["tiny", "tiny-flow"], "tiny"))
def test_a_run_is_the_resident_one(
    name: str, random_tiny: dict[str, Path], run_inside: Callable[..., str], tmp_path: Path
) -> None:
    """Adapters, previews and what the watch saw; the file is loaded back by ComfyUI's own loader."""
    told = json.loads(run_inside("streamed_run", random_tiny[name], tmp_path).strip().splitlines()[-1])
    assert told["same"] and told["previews"] and told["metrics"], told
    assert told["check"].startswith("ComfyUI") and "loads all" in told["check"]
