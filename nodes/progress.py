"""What a running distillation shows: ComfyUI's progress bar and previews, and the numbers for the chart in the node."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import torch
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..training.distil import Progress

EVENT = "onestep.progress"
PREVIEW_PIXELS = 1024
SHOWN = ("distance", "variety", "content", "spread", "no_gain", "regression", "critic", "gap")


class Reporter:
    """Called before the first update and after each: True once the button was pressed; ComfyUI's bar raises where it is
    cancelled."""

    def __init__(self, node: str | None, name: str, finish: threading.Event) -> None:
        self.node, self.name, self.finish = node, name, finish
        self.bar = comfy.utils.ProgressBar(1, node_id=node)
        self.sent = 0.0

    def __call__(self, progress: Progress) -> bool:
        picture = None
        if progress.preview is not None:
            with Image.open(progress.preview) as opened:
                picture = ("JPEG", opened.convert("RGB"), PREVIEW_PIXELS)
        self.bar.update_absolute(progress.update, progress.total, picture)
        telling = picture is not None or "distance" in progress.numbers or progress.update == progress.total
        if telling or time.monotonic() - self.sent > 0.25:
            self.sent = time.monotonic()
            send(EVENT, self.told(progress))
        return self.finish.is_set()

    def told(self, progress: Progress) -> dict[str, Any]:
        """The event's data, all of it JSON."""
        numbers = {key: progress.numbers[key] for key in SHOWN if math.isfinite(progress.numbers.get(key, math.nan))}
        return {
            **{"node": self.node, "name": self.name, "update": progress.update, "total": progress.total},
            **{"phase": progress.phase, "seconds": progress.seconds, "numbers": numbers},
            **{"eta": progress.eta if math.isfinite(progress.eta) else None},
            **{"notes": list(progress.notes), "preview": viewed(progress.preview)},
        }


def send(event: str, data: dict[str, Any]) -> None:
    """To every open page; nobody may be there."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_sync(event, data)


def viewed(path: Path | None) -> dict[str, str] | None:
    """How /view names a file in the output folder."""
    if path is None:
        return None
    folder = path.parent.relative_to(folder_paths.get_output_directory())
    return {"filename": path.name, "subfolder": folder.as_posix(), "type": "output"}


def as_image(path: Path | None) -> Tensor:
    """[1, H, W, 3] in [0, 1], as IMAGE; a grey square where there is no preview."""
    if path is None:
        return torch.full((1, 64, 64, 3), 0.5)
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(
        1, picture.height, picture.width, 3
    )
    return pixels.float() / 255


def loss_map(metrics: list[dict[str, Any]]) -> dict[str, list[float]]:
    """LOSS_MAP: the watch's distance to the teacher at each measure; a loss where that was measured but once."""
    for key in ("distance", "regression", "critic", "loss"):
        values = [float(line[key]) for line in metrics if line.get(key) is not None]
        if len(values) > 1:
            return {"loss": values}
    return {"loss": [0.0, 0.0]}
