"""A real ComfyUI for the tests: find one, start it on the CPU, speak HTTP and websocket with it.

Looked for at $COMFYUI_DIR, else the ComfyUI this pack stands in, else ~/comfy/ComfyUI; run by $COMFYUI_PYTHON, else by
its own `.venv`. The test process itself never imports ComfyUI.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import forks

PACK = Path(__file__).resolve().parents[2]
LAUNCHER = Path(__file__).with_name("comfy_launch.py")
# Dots and brackets: a clone may be called anything. Not a space: ComfyUI serves no browser part from such a folder.
PACK_FOLDER = "One.Step-pack_(1)"
Graph = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class ComfyInstall:
    """A ComfyUI checkout and the Python that runs it."""

    root: Path
    python: Path

    def run_script(self, script: Path, *arguments: str | Path, seconds: float = 300) -> str:
        """Run a test script inside a CPU-only ComfyUI process; returns what it printed, raises with its output."""
        words = [str(script), *map(str, arguments)]
        done: forks.Ended | subprocess.CompletedProcess[str]
        if forks.POSSIBLE:
            (done,) = forks_of(self).run(words, [quiet_environment()], seconds)
        else:
            command = [*self.command(), *words]
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=quiet_environment())
        if done.returncode:
            said = f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
            raise AssertionError(f"{script.name} failed in ComfyUI's Python:\n{said}")
        return done.stdout

    def command(self) -> list[str]:
        return [str(self.python), str(LAUNCHER), str(self.root)]


@cache
def forks_of(install: ComfyInstall) -> forks.Forks:
    return forks.Forks([*install.command(), "forks"], quiet_environment())


def quiet_environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}


def comfy_candidates() -> list[Path]:
    told = os.environ.get("COMFYUI_DIR")
    places = [Path(told)] if told else [PACK.parents[1], Path.home() / "comfy" / "ComfyUI"]
    return [place.expanduser().resolve() for place in places]


def find_comfy() -> ComfyInstall | str:
    """The ComfyUI to test against, or one sentence saying where it was looked for and what is missing."""
    for root in comfy_candidates():
        if not (root / "main.py").is_file() or not (root / "comfy" / "sd.py").is_file():
            continue
        told = os.environ.get("COMFYUI_PYTHON")
        inside = [root / ".venv" / "bin" / "python", root / ".venv" / "Scripts" / "python.exe"]
        for python in [Path(told)] if told else inside:
            if python.is_file():
                return ComfyInstall(root, python.absolute())
        return f"ComfyUI at {root} has no .venv and COMFYUI_PYTHON names no Python"
    looked = ", ".join(map(str, comfy_candidates()))
    return f"no ComfyUI at {looked} (set COMFYUI_DIR and COMFYUI_PYTHON)"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def place_pack(custom_nodes: Path, folder: str = PACK_FOLDER) -> Path:
    """Copy what a clone holds under custom_nodes."""
    place = custom_nodes / folder
    anywhere = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")
    at_root = {"runs", "tests", "benchmarks", "build"}

    def skipped(folder: str, names: list[str]) -> set[str]:
        return anywhere(folder, names) | (at_root & set(names) if Path(folder) == PACK else set())

    shutil.copytree(PACK, place, ignore=skipped)
    return place


@dataclass
class Finished:
    """One executed graph: how it ended, what each node put out, the events and preview pictures on the way."""

    prompt_id: str
    status: str
    outputs: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)

    @property
    def error(self) -> str:
        """The message of the node that failed, or ''."""
        for name, data in self.events:
            if name == "execution_error":
                return str(data.get("exception_message", ""))
        return ""

    def named(self, event: str) -> list[dict[str, Any]]:
        return [data for name, data in self.events if name == event]


class GraphRefused(AssertionError):
    """The server did not take the graph; the message is its answer."""


class ComfyServer:
    """A running server; its private folders are under `base`."""

    def __init__(self, install: ComfyInstall, base: Path, port: int, process: subprocess.Popen[bytes]) -> None:
        self.install, self.base, self.port, self.process = install, base, port, process
        self.address = f"127.0.0.1:{port}"
        self.url = f"http://{self.address}"

    def log(self) -> str:
        return (self.base / "server.log").read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        return json.loads(self.get_bytes(path))

    def get_bytes(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return bytes(answer.read())

    def post(self, path: str, payload: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(payload).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body = answer.read()
        except urllib.error.HTTPError as refused:
            raise GraphRefused(f"{path}: {refused.code} {refused.read().decode()[:3000]}") from None
        return json.loads(body) if body else None

    def interrupt(self, prompt_id: str) -> None:
        self.post("/interrupt", {"prompt_id": prompt_id})

    def free(self) -> None:
        """Unload every model and forget every cached output."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def pixels(self, entry: dict[str, str]) -> Any:
        """A SaveImage output entry -> uint8 array [H, W, C]."""
        import numpy
        from PIL import Image

        return numpy.asarray(Image.open(io.BytesIO(self.get_bytes("/view?" + urllib.parse.urlencode(entry)))))

    def run(
        self,
        graph: Graph,
        seconds: float = 300,
        on_event: Callable[[str, dict[str, Any], str], None] | None = None,
    ) -> Finished:
        """Queue an API-format graph and follow it to its end; on_event(name, data, prompt_id) may interrupt it."""
        import websocket

        client = uuid.uuid4().hex
        channel = websocket.create_connection(f"ws://{self.address}/ws?clientId={client}", timeout=seconds)
        try:
            channel.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
            prompt_id = self.post("/prompt", {"prompt": graph, "client_id": client})["prompt_id"]
            finished = Finished(prompt_id, "running", {})
            follow(channel, finished, time.monotonic() + seconds, on_event)
        finally:
            channel.close()
        record = self.get(f"/history/{prompt_id}")[prompt_id]
        finished.status, finished.outputs = record["status"]["status_str"], record["outputs"]
        return finished

    def images(self, finished: Finished, node: str) -> list[Any]:
        """All pictures a node put out, as uint8 arrays [H, W, C]."""
        if finished.status != "success":
            raise AssertionError(f"the graph ended in {finished.status}: {finished.error}")
        return [self.pixels(entry) for entry in finished.outputs[node]["images"]]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def follow(
    channel: Any,
    finished: Finished,
    deadline: float,
    on_event: Callable[[str, dict[str, Any], str], None] | None,
) -> None:
    """Collect events until the server says that nothing executes any more (only then does the history exist)."""
    while time.monotonic() < deadline:
        message = channel.recv()
        if isinstance(message, bytes):
            finished.previews.append(message)
            continue
        event = json.loads(message)
        name, data = event["type"], event.get("data", {})
        finished.events.append((name, data))
        if on_event is not None:
            on_event(name, data, finished.prompt_id)
        if name == "executing" and data.get("node") is None and data.get("prompt_id") == finished.prompt_id:
            return
    raise AssertionError(f"the graph did not end in time; last events: {finished.events[-5:]}")


def server_command(install: ComfyInstall, base: Path, port: int, flags: tuple[str, ...]) -> list[str]:
    return [
        *(*install.command(), "main.py", "--cpu", "--use-pytorch-cross-attention"),
        *("--preview-method", "latent2rgb", "--listen", "127.0.0.1", "--port", str(port)),
        *("--base-directory", str(base), "--database-url", f"sqlite:///{base}/user/comfyui.db"),
        *("--disable-auto-launch", "--disable-api-nodes", *flags),
    ]


@contextmanager
def running_server(install: ComfyInstall, base: Path, *flags: str, seconds: float = 180) -> Iterator[ComfyServer]:
    """Start a server whose models, input, output, user and custom_nodes folders are private to `base`."""
    for folder in ("models/checkpoints", "models/loras", "models/onestep", "input", "output", "user", "temp"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    if not (base / "custom_nodes").exists():
        place_pack(base / "custom_nodes")
    port = free_port()
    with open(base / "server.log", "wb") as log:
        process = subprocess.Popen(
            server_command(install, base, port, flags), stdout=log, stderr=subprocess.STDOUT, env=quiet_environment()
        )
    server = ComfyServer(install, base, port, process)
    try:
        wait_until_up(server, time.monotonic() + seconds)
        yield server
    finally:
        server.stop()


def wait_until_up(server: ComfyServer, deadline: float) -> None:
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise AssertionError(f"ComfyUI ended with {server.process.returncode}:\n{server.log()[-6000:]}")
        try:
            server.get("/system_stats")
            return
        except OSError:
            time.sleep(0.25)
    raise AssertionError(f"ComfyUI did not answer in time:\n{server.log()[-6000:]}")
