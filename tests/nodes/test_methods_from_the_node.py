"""The methods that make a LoRA, each from the trainer's node in a real ComfyUI: cancelled, finished early, and its
server killed; it goes on, and ends as the run that nobody cut, to the bit."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_graphs import distil, loader
from comfy_support import running_server
from own_pictures import needed_by

from onestep.core.lora_file import load_lora
from onestep.training.methods import METHODS
from onestep.training.runs.run import Run

pytestmark = [pytest.mark.comfy, pytest.mark.broad, pytest.mark.filterwarnings("ignore")]
TRIED = [name for name, method in METHODS.items() if method.makes == "LoRA" and name != "tune"]
"""tune learns from a person's pictures: tests/nodes/test_tune.py."""
SEVERAL = {"cdm": "4", "lcm": "4", "mlcm": "4", "pcm": "4"} | dict.fromkeys(
    ("tdm", "phased-dmd", "tcd", "tscd", "scott", "perflow", "pso"), "2"
)
"""In how many the students of some draw; the others in one."""
UPDATES = 30


def own(base: Path, method: str) -> None:
    """What a person would give it, in the input folder of ComfyUI at ``base``."""
    if not (base / "input" / method).exists():
        needed_by(method, base / "input" / method)


def graph(name: str, method: str, updates: int = UPDATES) -> dict[str, Any]:
    kept = {"candidate_every": 4, "choose_by": "distance", "ema": 0.9, "learning_rate": 1e-3}
    if hasattr(METHODS[method].settings, "needs_pictures"):
        kept |= {"pictures": f"{method}/own", "drawn": "few"}
    kept |= {"students": 2} if method == "msd" else {}
    kept |= {"forget": "wall", "instead": "house"} if method == "sfd" else {}
    told = {"steps": updates, "existing": "continue", "student_steps": SEVERAL.get(method, "1")}
    return {"model": loader("tiny"), "distil": distil(name, method, kept, **told)}


def after(update: int, act: Callable[[str], Any]) -> Callable[[str, dict[str, Any], str], None]:
    """Calls ``act`` with the prompt's id once the run has told of ``update`` or a later one."""
    done: list[int] = []

    def on_event(name: str, data: dict[str, Any], prompt_id: str) -> None:
        if name == "onestep.progress" and data["update"] >= update and data["numbers"] and not done:
            done.append(data["update"])
            act(prompt_id)

    return on_event


def factors(base: Path, name: str) -> dict[str, bytes]:
    state = load_lora(base / "models" / "loras" / "onestep" / f"{name}.safetensors").state
    return {key: torch.cat([a.flatten(), b.flatten()]).numpy().tobytes() for key, (a, b) in state.items()}


def updates_of(base: Path, name: str) -> list[int]:
    return [line["update"] for line in Run(base / "output" / "onestep" / name).metrics()]


@pytest.fixture(scope="module", params=TRIED)
def uncut(request: Any, comfy_server: Any) -> tuple[str, dict[str, bytes]]:
    method = request.param
    own(comfy_server.base, method)
    finished = comfy_server.run(graph(f"{method}-uncut", method))
    assert finished.status == "success", finished.error
    assert (comfy_server.base / "output" / "onestep" / f"{method}-uncut" / "choice.png").is_file()
    return method, factors(comfy_server.base, f"{method}-uncut")


def test_cancel(uncut: Any, comfy_server: Any) -> None:
    method, wanted = uncut
    name = f"{method}-cancelled"
    cut = comfy_server.run(graph(name, method), on_event=after(5, comfy_server.interrupt))
    assert cut.named("execution_interrupted"), cut.status
    assert (comfy_server.base / "output" / "onestep" / name / "partial.safetensors").is_file()
    at = updates_of(comfy_server.base, name)[-1]
    assert 5 <= at < UPDATES
    assert comfy_server.run(graph(name, method)).status == "success"
    assert factors(comfy_server.base, name) == wanted


def test_finish(uncut: Any, comfy_server: Any) -> None:
    method, _ = uncut
    name = f"{method}-early"

    def press(prompt_id: str) -> None:
        assert comfy_server.post("/onestep/finish", {"name": name}) == {"asked": True}

    finished = comfy_server.run(graph(name, method, 500), on_event=after(5, press))
    assert finished.status == "success", finished.error
    assert "finished early" in finished.outputs["distil"]["text"][0]
    assert 5 <= updates_of(comfy_server.base, name)[-1] < 500 and factors(comfy_server.base, name)


def test_a_killed_server(uncut: Any, comfy: Any, pack: Path, tmp_path: Path) -> None:
    """SIGKILL in the midst of an update; another server on the same folders goes on."""
    method, wanted = uncut
    (tmp_path / "custom_nodes").symlink_to(pack.parent)
    own(tmp_path, method)
    with running_server(comfy, tmp_path) as server:
        with pytest.raises(Exception):  # noqa: B017  (whatever the socket says of a server that is gone)
            server.run(
                graph("killed", method), on_event=after(5, lambda prompt_id: server.process.send_signal(signal.SIGKILL))
            )
        assert server.process.wait(20) == -signal.SIGKILL
    before = updates_of(tmp_path, "killed")
    assert (
        5 <= before[-1] < UPDATES and not (tmp_path / "output" / "onestep" / "killed" / "result.safetensors").exists()
    )
    with running_server(comfy, tmp_path) as server:
        assert server.run(graph("killed", method)).status == "success"
    assert factors(tmp_path, "killed") == wanted
