"""SD1.5, SD2, SDXL, SD3, SD3.5 and Flux at full size: both hosts' trees give the same targets of the same shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from published_networks import IN_COMFY, PUBLISHED, on_meta

from onestep.core.families import bind_diffusers

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def bound(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("trees")
    configs = {name: (PUBLISHED[name][0], config) for name, config in IN_COMFY.items()}
    (folder / "configs.json").write_text(json.dumps(configs))
    run_inside("published_trees", folder / "configs.json", folder / "out.json")
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_equal_targets_in_both_hosts(name: str, bound: Any) -> None:
    ours = [[target.name, list(target.shape_a(1)), list(target.shape_b(1))] for target in bind_diffusers(on_meta(name))]
    assert bound[name] == ours
