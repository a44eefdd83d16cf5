"""What a running distillation shows: ComfyUI's progress bar and previews, and the numbers for the chart in the node."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import torch
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..training.watch.progress import Progress, Request
from .requests import Asked

EVENT = "onestep.progress"
PREVIEW_PIXELS = 1024
SHOWN: tuple[str, ...] = ("distance", "variety", "content", "spread", "no_gain", "regression", "critic", "gap")
SHOWN += ("pictures", "margin", "kept", "reward", "reward_pull")


class Reporter:
    """Called from a run's first second on: answers with what its buttons asked for; ComfyUI's bar raises where it is
    cancelled."""

    def __init__(self, node: str | None, name: str, asked: Asked, has_panel: bool) -> None:
        self.node, self.name, self.asked, self.has_panel = node, name, asked, has_panel
        self.phase = ""
        self.bar = comfy.utils.ProgressBar(1, node_id=node)
        self.sent = 0.0

    def __call__(self, progress: Progress) -> Request:
        if progress.phase != self.phase:
            # ComfyUI's bar shows no value below the one before: each phase has a bar of its own
            self.bar = comfy.utils.ProgressBar(max(progress.of, 1), node_id=self.node)
        self.bar.update_absolute(progress.done, max(progress.of, 1), self._picture(progress))
        news = progress.preview is not None or "distance" in progress.numbers or progress.phase != self.phase
        self.phase = progress.phase
        if news or progress.update == progress.total or time.monotonic() - self.sent > 0.25:
            self.sent = time.monotonic()
            send(EVENT, self.told(progress))
        # before its first update a run does nothing that it is asked for: the buttons wait
        return self.asked.take() if progress.update and progress.numbers else Request.NONE

    def _picture(self, progress: Progress) -> Any:
        """The preview for ComfyUI's own place under the node, where no panel shows it."""
        if progress.preview is None or self.has_panel:
            return None
        with Image.open(progress.preview) as opened:
            return "JPEG", opened.convert("RGB"), PREVIEW_PIXELS

    def told(self, progress: Progress) -> dict[str, Any]:
        """The event's data, all of it JSON."""
        numbers = {key: progress.numbers[key] for key in SHOWN if math.isfinite(progress.numbers.get(key, math.nan))}
        return {
            **{"node": self.node, "name": self.name, "update": progress.update, "total": progress.total},
            **{"phase": progress.phase, "done": progress.done, "of": progress.of},
            **{"seconds": progress.seconds, "numbers": numbers},
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
