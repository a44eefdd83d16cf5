"""A workflow of a person's own files with a tiny folder in their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from small_runs import small

SLOTS = {"UNETLoader": 0, "CLIPLoader": 1, "VAELoader": 2}


def cut_short(root: Path, name: str, folder: Path) -> dict[str, Any]:
    """Its API graph, whose run takes two updates at 32x32 and whose pictures are 64x64."""
    told = json.loads((root / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    loaders = {key: SLOTS[node["class_type"]] for key, node in told.items() if node["class_type"] in SLOTS}
    for node in told.values():
        for key, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in loaders:
                node["inputs"][key] = ["model", loaders[value[0]]]
    told = {key: node for key, node in told.items() if key not in loaders}
    told["model"] = {"class_type": "LoadTinyFolder", "inputs": {"folder": str(folder)}}
    (trainer,) = (node["inputs"] for node in told.values() if node["class_type"] == "OneStepDistil")
    trainer |= small("cdm", steps=2, learning_rate=0.05)
    trainer |= {"sizes": "32x32", "student_steps": "4", "teacher_steps": 2, "rank": 2}
    (size,) = (node["inputs"] for node in told.values() if node["class_type"].startswith("Empty"))
    size |= {"width": 64, "height": 64}
    return told


def check_drawn(server: Any, told: dict[str, Any]) -> None:
    """Two pictures side by side, which differ."""
    (show,) = (key for key, node in told.items() if node["class_type"] == "PreviewImage")
    (drawn,) = server.images(server.run(told), show)
    height, width = drawn.shape[:2]
    assert width == 2 * height + 8 and (drawn[:, :height] != drawn[:, -height:]).mean() > 0.02
