"""Fixtures of the ComfyUI tests: an installation, a running server, tiny checkpoints, a browser page."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser
import comfy_support
import pytest
import tiny_folders

TESTS = Path(__file__).resolve().parents[1]
INSIDE = Path(__file__).with_name("inside")  # scripts that run in ComfyUI's own Python
SKIPPED_FOR = {"reason": ""}


@pytest.fixture(scope="session")
def comfy() -> Any:
    """The ComfyUI to test against; without one every test that asks is skipped by name."""
    found = comfy_support.find_comfy()
    if isinstance(found, str):
        SKIPPED_FOR["reason"] = found
        pytest.skip(found)
    return found


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    if SKIPPED_FOR["reason"]:
        terminalreporter.section("ComfyUI", sep="!", red=True, bold=True)
        terminalreporter.line(f"NO REAL-COMFYUI TEST HAS RUN: {SKIPPED_FOR['reason']}", red=True, bold=True)


@pytest.fixture(scope="session")
def run_inside(comfy: Any) -> Callable[..., str]:
    """run_inside("name", *arguments): run tests/nodes/inside/name.py in ComfyUI's Python."""
    return lambda name, *arguments, **kw: comfy.run_script(INSIDE / f"{name}.py", *arguments, **kw)


@pytest.fixture(scope="session")
def checkpoints(comfy: Any) -> Path:
    """Folder of the tiny sd15, sd3 and flux checkpoints with random weights, made once per machine."""
    maker = TESTS / "support" / "make_tiny_checkpoints.py"
    version = (comfy.root / "comfyui_version.py").read_bytes()
    key = hashlib.sha256(maker.read_bytes() + version).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"onestep-tiny-checkpoints-{key}"
    if not folder.is_dir():
        making = Path(tempfile.mkdtemp(prefix="onestep-making-"))
        comfy.run_script(maker, making, "sd15", "sd3", "flux")
        making.replace(folder)  # whole or not at all: two runs may race
    return folder


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory, random_tiny: dict[str, Path]) -> Path:
    """This pack under custom_nodes in an oddly named folder; tiny models that are not there yet have random weights.
    Beside it a node that loads any folder of a tiny model."""
    place = comfy_support.place_pack(tmp_path_factory.mktemp("comfy") / "custom_nodes")
    shutil.copyfile(TESTS / "support" / "folder_model_node.py", place.with_name("folder_model_node.py"))
    for name in ("tiny", "tiny-flow", "tiny-dit"):
        if not (place / "pipelines" / "tiny" / name / "model_index.json").is_file():
            shutil.copytree(random_tiny[name], place / "pipelines" / "tiny" / name, dirs_exist_ok=True)
    return place


@pytest.fixture(scope="session")
def bundled(pack: Path) -> dict[str, Path]:
    """Folders of the tiny models that the server's nodes load."""
    return {name: pack / "pipelines" / "tiny" / name for name in ("tiny", "tiny-flow", "tiny-dit")}


@pytest.fixture(scope="session")
def comfy_server(comfy: Any, pack: Path) -> Iterator[Any]:
    """One real server for the whole run."""
    with comfy_support.running_server(comfy, pack.parents[1]) as server:
        yield server


@pytest.fixture(scope="session")
def server_with_checkpoints(comfy_server: Any, checkpoints: Path) -> Any:
    """The same server with the tiny checkpoints in models/checkpoints and models/vae."""
    for file in checkpoints.glob("*.safetensors"):
        place = comfy_server.base / "models" / "checkpoints" / file.name
        if not place.exists():
            try:
                place.symlink_to(file)
            except OSError:
                shutil.copyfile(file, place)
    return comfy_server


@pytest.fixture(scope="session")
def stirred(server_with_checkpoints: Any, checkpoints: Path, run_inside: Callable[..., str]) -> Any:
    """That server with adapters of its checkpoints: guidance-KIND, control-KIND, and negative-sd15."""
    folder = server_with_checkpoints.base / "models" / "onestep"
    folder.mkdir(parents=True, exist_ok=True)
    run_inside("stirred_adapters", checkpoints, folder)
    return server_with_checkpoints


@pytest.fixture
def open_page(comfy_server: Any) -> Callable[..., Any]:
    """open_page(vue=False): a browser page on the server's front end, as a context manager."""
    if missing := browser.why_no_browser():
        pytest.skip(missing)
    return lambda vue=False: browser.open_page(comfy_server.url, vue)


@pytest.fixture(scope="session")
def random_tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders laid out like the bundled tiny models, with random weights, and a v-predicting U-Net."""
    base = tmp_path_factory.mktemp("random_tiny")
    return {
        "tiny": tiny_folders.unet_folder(base / "tiny"),
        "tiny-flow": tiny_folders.sd3_folder(base / "tiny-flow"),
        "tiny-dit": tiny_folders.z_image_folder(base / "tiny-dit"),
        "tiny-v": tiny_folders.unet_folder(base / "tiny-v", widths=(32, 64), prediction="v_prediction", linear=True),
    }
