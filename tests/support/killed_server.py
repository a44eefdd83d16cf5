"""A ComfyUI server that is killed while it trains, and another that goes on with the run."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_support import running_server

from onestep.core.lora_file import load_lora
from onestep.training.runs.run import Run


def lora_of(server: Any, name: str) -> Path:
    return Path(server.base / "models" / "loras" / "onestep" / f"{name}.safetensors")


def factors(path: Path) -> dict[str, bytes]:
    state = load_lora(path).state
    return {key: torch.cat([a.flatten(), b.flatten()]).numpy().tobytes() for key, (a, b) in state.items()}


def resumed(comfy: Any, pack: Path, base: Path, graph: Callable[[], dict[str, Any]], name: str, update: int) -> Path:
    """The LoRA of the run ``name``, whose server was killed at ``update`` or behind it. base: an empty folder."""
    (base / "custom_nodes").symlink_to(pack.parent)
    with running_server(comfy, base) as server:

        def kill(event: str, data: dict[str, Any], prompt_id: str) -> None:
            if event == "onestep.progress" and data["update"] >= update and data["numbers"]:
                server.process.send_signal(signal.SIGKILL)

        with pytest.raises(Exception):  # noqa: B017  (whatever the socket says of a server that is gone)
            server.run(graph(), on_event=kill)
        assert server.process.wait(20) == -signal.SIGKILL
    run = Run(base / "output" / "onestep" / name)
    assert run.metrics()[-1]["update"] >= update and not (run.folder / "result.safetensors").exists()
    with running_server(comfy, base) as server:
        finished = server.run(graph())
        assert finished.status == "success", finished.error
        return lora_of(server, name)
