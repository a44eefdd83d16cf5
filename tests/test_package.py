"""One copy of every class, however OneStep is installed: a wheel, an editable install, a folder of any name."""

from __future__ import annotations

import email
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = {"tests", "benchmarks", "tools", "docs", "runs", "build", "dist"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# What ComfyUI does with a folder under custom_nodes: its file, under a name made of its path.
LOAD_AS_COMFYUI_DOES = """
import importlib.util, sys
def load(folder):
    name = folder.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
# Neither host, nor what comes with diffusers, is there to be imported.
WITHOUT_HOSTS = """
import sys
for absent in ("comfy", "comfy_api", "folder_paths", "diffusers", "peft", "transformers"):
    sys.modules[absent] = None
"""


def python(code: str, *, path: Path | None = None, executable: str = sys.executable) -> str:
    """Run code in a fresh interpreter, away from the checkout; its output."""
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    done = subprocess.run(
        [executable, "-c", code], capture_output=True, text=True, env=environment, cwd=Path(sys.prefix), timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def pip(*arguments: str | Path) -> None:
    """pip without network, index or isolated builds."""
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-index", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def copy_of_pack(folder: Path) -> Path:
    """What a clone holds, less what is not shipped."""

    def leave_out(parent: str, names: list[str]) -> set[str]:
        hidden = {name for name in names if name.startswith(".") or name.endswith((".egg-info", "__pycache__"))}
        return hidden | (NOT_SHIPPED & set(names) if Path(parent) == ROOT else set())

    return Path(shutil.copytree(ROOT, folder, ignore=leave_out))


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    """A clone in a folder whose name is no identifier."""
    return copy_of_pack(tmp_path_factory.mktemp("custom_nodes") / "One.Step pack (1)")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel, built from a copy so that the checkout keeps no build folder."""
    pytest.importorskip("setuptools", reason="needs setuptools, which the dev extra installs")
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", copy_of_pack(folder / "source"), "--no-build-isolation", "--wheel-dir", folder)
    return next(folder.glob("*.whl"))


def test_every_package_is_listed():
    folders = {path.parent.relative_to(ROOT).parts for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    shipped = {parts for parts in folders if not parts or (parts[0] not in NOT_SHIPPED and parts[0][0] != ".")}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(".".join(["onestep", *parts]) for parts in shipped)
    bare = [name for name in listed if not ROOT.joinpath(*name.split(".")[1:], "__init__.py").is_file()]
    assert bare == ["onestep.pipelines.custom"], "only the folder that diffusers loads by its path needs no __init__.py"


def test_comfyuis_managers_install_nothing():
    """Whatever requirements.txt asked for could move a package that the ComfyUI around it needs as it is."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines and all(line.startswith("#") for line in lines)


def test_the_package_asks_for_lower_bounds_and_for_no_torch():
    needs = [need for need in PROJECT["project"]["dependencies"] if not need.startswith("comfyui-frontend-package")]
    assert all(re.fullmatch(r"[a-z]+>=[\d.]+", need) for need in needs), needs
    assert [need.split(">=")[0] for need in needs] == ["diffusers", "peft"]


def test_the_lowest_torch_is_the_same_everywhere():
    """In the doctor's words, in the README, in pyproject.toml and in what tools/torch_versions.py tries first."""
    from onestep.cli.doctor import LOWEST_TORCH

    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "pyproject.toml")}
    assert f"torch {LOWEST_TORCH} or newer" in texts["README.md"]
    assert f"{LOWEST_TORCH} is the lowest that" in texts["pyproject.toml"]
    tried = re.search(r'VERSIONS = \("([\d.]+)"', (ROOT / "tools" / "torch_versions.py").read_text(encoding="utf-8"))
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").strip().splitlines()[-1]
    assert tried is not None and tried[1] == f"{LOWEST_TORCH}.0" and pinned.startswith("torch==")


def test_the_least_comfyui_is_the_same_everywhere():
    least = PROJECT["tool"]["comfy"]["requires-comfyui"].removeprefix(">=").rpartition(".")[0]
    for name in ("README.md", "docs/install.md"):
        assert f"ComfyUI {least} or newer" in (ROOT / name).read_text(encoding="utf-8"), name


def test_the_registry_can_read_the_project():
    """The rules that comfy-cli checks (comfy_cli/registry/config_parser.py), and its specification's names."""
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    bounds = [need for need in project["dependencies"] if need.startswith("comfyui-frontend-package")]
    version = r"^(==|>=|<=|!=|~=|>|<)\s*\d+\.\d+\.\d+$"
    assert [bool(re.match(version, bound.removeprefix("comfyui-frontend-package"))) for bound in bounds] == [True]
    assert re.match(version, comfy["requires-comfyui"])
    assert re.fullmatch(r"[a-z][a-z0-9.-]{0,98}", project["name"]) and "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"]) and comfy["DisplayName"]
    # WEB_DIRECTORY registers the browser part; a `web` here as well would load every script twice.
    assert "web" not in comfy


def test_one_version():
    assert f'__version__ = "{PROJECT["project"]["version"]}"' in (ROOT / "__init__.py").read_text(encoding="utf-8")


def test_continuous_integration_runs_what_the_readme_says():
    readme, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    script = ROOT / ".ci" / "run"
    assert "\ntest-all:" in makefile, "README and docs name it"
    for command in ("make demo", "make test"):
        assert command in readme and f"\n{command.split()[1]}:" in makefile
    assert "make test" in script.read_text(encoding="utf-8")
    assert os.name == "nt" or os.access(script, os.X_OK)


def test_what_comfyui_does_not_need_is_left_out_of_the_archive():
    left_out = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    assert {f"{name}/" for name in NOT_SHIPPED - {"runs", "build", "dist"}} <= set(left_out)


def test_a_folder_of_any_name_is_one_package(pack):
    """Loaded as ComfyUI does, `onestep` is this folder, once; and needs neither host to be imported."""
    found = python(
        WITHOUT_HOSTS + LOAD_AS_COMFYUI_DOES + f"module = load({str(pack)!r})\n"
        "import onestep, onestep.core.errors, onestep.kernels\n"
        "assert module.WEB_DIRECTORY == './web' and not hasattr(module, 'NODE_CLASS_MAPPINGS')\n"
        "copies = [name for name in sys.modules if name.endswith('core.errors')]\n"
        "print(onestep.__file__, copies, 'nodes' in sys.modules, sep='|')"
    )
    assert found == f"{pack / '__init__.py'}|['onestep.core.errors']|False"


def test_a_second_folder_is_served_by_the_first(pack, tmp_path):
    """Two clones, one set of classes, and a word about it."""
    other = copy_of_pack(tmp_path / "again")
    found = python(
        LOAD_AS_COMFYUI_DOES + "import logging, io\nlog = io.StringIO()\nlogging.basicConfig(stream=log)\n"
        f"load({str(pack)!r}); first = sys.modules['onestep']; load({str(other)!r})\n"
        "print(sys.modules['onestep'] is first, log.getvalue())"
    )
    assert found.startswith("True") and str(pack) in found and str(other) in found and "remove one of them" in found


def test_a_failed_start_leaves_nothing_behind(tmp_path):
    """A broken pack must not leave a half-made `onestep` for the next one to find."""
    folder = copy_of_pack(tmp_path / "broken")
    start = (folder / "__init__.py").read_text(encoding="utf-8")
    (folder / "__init__.py").write_text(start + '\nif __name__ == "onestep":\n    raise RuntimeError("broken")\n')
    found = python(
        LOAD_AS_COMFYUI_DOES + f"try:\n    load({str(folder)!r})\nexcept RuntimeError as e:\n    print(e)\n"
        "print('onestep' in sys.modules)"
    )
    assert found.split() == ["broken", "False"]


def test_the_wheel_holds_what_is_shipped_and_asks_for_no_front_end(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("onestep/")}
        metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        header = email.message_from_bytes(archive.read(metadata))
    folders = ["cli", "core", "kernels", "locales", "nodes", "pipelines", "subgraphs", "training", "web", "workflows"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    made = {"__pycache__", "build"}
    shipped = {path.relative_to(ROOT).as_posix() for path in files if not made & set(path.parts)}
    assert {name.removeprefix("onestep/") for name in names} == shipped | {"__init__.py", "__main__.py", "py.typed"}
    needs = [need.split(";")[0].strip() for need in header.get_all("Requires-Dist") if "extra ==" not in need]
    assert sorted(need.split(">=")[0] for need in needs) == ["diffusers", "peft"]


def test_a_clone_wins_over_an_installed_wheel(wheel, pack, tmp_path):
    site = tmp_path / "site"
    pip("install", wheel, "--target", site)
    where = "import onestep.core.errors as e; print(e.__file__)"
    assert Path(python(where, path=site)) == site / "onestep" / "core" / "errors.py"
    both = LOAD_AS_COMFYUI_DOES + f"load({str(pack)!r})\n" + where
    assert Path(python(both, path=site)) == pack / "core" / "errors.py"


@pytest.mark.broad
def test_an_editable_install_is_the_same_copy(pack, tmp_path):
    pytest.importorskip("setuptools", reason="needs setuptools, which the dev extra installs")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True, timeout=120)
    scripts = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    executable = str(scripts / ("python.exe" if os.name == "nt" else "python"))
    site = Path(python("import sysconfig; print(sysconfig.get_path('purelib'))", executable=executable))
    # A path in a .pth brings this environment's torch and setuptools, but not its own editable installs.
    outer = {str(Path(importlib.import_module(name).__file__).parents[1]) for name in ("torch", "setuptools")}
    (site / "outer.pth").write_text("\n".join(outer) + "\n", encoding="utf-8")
    pip("--python", executable, "install", "--editable", pack, "--no-build-isolation")
    found = python(
        LOAD_AS_COMFYUI_DOES + "from onestep.core.errors import OneStepError as installed\n"
        f"load({str(pack)!r})\n"
        "import onestep.core.errors as loaded\n"
        "print(loaded.OneStepError is installed, loaded.__file__)",
        executable=executable,
    )
    assert found == f"True {pack / 'core' / 'errors.py'}"
    assert any(entry.stem == "onestep" for entry in scripts.iterdir()), "the command `onestep` is installed"


def test_a_submodule_does_not_hide_the_function_of_its_name():
    pipelines = importlib.import_module("onestep.pipelines")
    for name in ("adapt", "distill", "load"):
        module = importlib.import_module(f"onestep.pipelines.{name}")
        setattr(pipelines, name, module)  # what the import system does the first time
        assert getattr(pipelines, name) is getattr(module, name)
