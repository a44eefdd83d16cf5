"""The house style as a test: who may import whom, what never runs, how long things may be, and which files exist."""

from __future__ import annotations

import ast
import gc
import graphlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
UNTRACKED = {".git", ".venv", ".pkg", "/runs", "build", "dist", "__pycache__"}
"""Names of folders and files; the root's alone where a slash stands before it."""

# Imports run one way: kernels <- core <- training <- {pipelines, nodes}; pipelines <- cli.
MAY_IMPORT = {
    "kernels": set(),
    "core": {"kernels"},
    "training": {"core", "kernels"},
    "pipelines": {"training", "core", "kernels"},
    "nodes": {"training", "core", "kernels"},
    "cli": {"pipelines", "training", "core", "kernels"},
    "__main__.py": {"cli"},
}
# The rooms of training, and what each knows beside settings.py and host.py. distil.py and presets.py know all.
ROOMS = {
    "engine": set(),
    "data": {"engine"},
    "runs": {"engine"},
    "watch": {"engine", "data", "runs"},
    "methods": {"engine", "data", "watch"},
    "evaluation": set(),
    "plan": {"engine", "data", "watch", "methods"},
}
DIFFUSERS = {"diffusers", "transformers", "peft", "tokenizers"}
COMFY = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "server", "node_helpers", "aiohttp"}
COMFY |= {"latent_preview", "comfyui_version", "execution", "nodes"}
COMMON = {"torch", "numpy", "safetensors"}
LIBRARIES = {
    "kernels": {"torch", "xformers", "triton"},
    "core": COMMON,
    "training": COMMON | {"PIL", "tqdm", "bitsandbytes"},
    "pipelines": COMMON | {"PIL", "tqdm"} | DIFFUSERS,
    "nodes": COMMON | {"PIL", "tqdm"} | COMFY,
    "cli": COMMON | {"PIL", "tqdm"},
}
# No pickle, no network, no other process, nothing installed at run time.
FORBIDDEN_MODULES = {
    *("pickle", "marshal", "shelve", "dbm", "subprocess", "multiprocessing", "socket", "socketserver", "ssl"),
    *("urllib", "http", "ftplib", "smtplib", "xmlrpc", "webbrowser", "ensurepip", "venv", "ctypes", "pty"),
}
MAY_RUN_A_COMPILER = "kernels/compile_cuda.py"
"""By hand alone, with `python -m onestep.kernels build`."""
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "breakpoint"}
FORBIDDEN_CALLS = {
    "torch.load": "reads pickles",
    "torch.save": "writes pickles",
    "torch.hub.load": "downloads code",
    "os.system": "runs a command",
    "os.popen": "runs a command",
    "os.fork": "is not on Windows",
    "os.symlink": "is not on Windows",
}

PYTHON, TEXT, PICTURES = {".py"}, {".md", ".json", ".toml", ".txt"}, {".png", ".jpg", ".webp", ".svg"}
KNOWN_FILES = {
    "cli": PYTHON,
    "core": PYTHON,
    "kernels": PYTHON | {".cu"},
    "training": PYTHON,
    "nodes": PYTHON,
    "pipelines": PYTHON | {".json", ".txt", ".safetensors", ".md", ".jinja"},
    "web": {".js", ".css", ".md"} | PICTURES,
    "workflows": {".json"} | PICTURES,
    "subgraphs": {".json"},
    "locales": {".json"},
    "docs": {".md", ".yaml"} | PICTURES,
    "tests": PYTHON | TEXT | {".safetensors"},
    "tools": PYTHON,
    "benchmarks": PYTHON | TEXT | PICTURES | {".jsonl", ".csv"},
}
ROOT_FILES = {
    *("__init__.py", "__main__.py", "setup.py", "py.typed", "pyproject.toml", "requirements.txt", "constraints.txt"),
    *("Makefile", "README.md", "LICENSE", ".gitignore", ".comfyignore", ".gitattributes", ".ci/run"),
}
MAX_FILE_BYTES = 16 * 2**20
MAX_FILE_LINES = {"tests": 400}  # elsewhere 300
MAX_FUNCTION_LINES = 60


def all_files() -> Iterator[PurePosixPath]:
    """Every file of the checkout, what the tools leave behind excepted."""
    stack = [ROOT]
    while stack:
        for entry in sorted(stack.pop().iterdir()):
            relative = PurePosixPath(entry.relative_to(ROOT).as_posix())
            name = f"/{entry.name}" if entry.parent == ROOT else entry.name
            if (
                {name, entry.name} & UNTRACKED
                or entry.name.endswith((".egg-info", "_cache", ".pyc"))
                or entry.is_symlink()
            ):
                continue
            if entry.is_dir():
                stack.append(entry)
            else:
                yield relative


@pytest.fixture(scope="module", autouse=True)
def _forgotten() -> Iterator[None]:
    """Six hundred trees are no burden for the tests of other files, and none that is walked for garbage as it grows."""
    gc.disable()
    yield
    gc.enable()
    parsed.cache_clear()


FILES = list(all_files())
SOURCES = [path for path in FILES if path.suffix == ".py"]
SHIPPED = [path for path in SOURCES if path.parts[0] in MAY_IMPORT or str(path) in ("__init__.py", "__main__.py")]


def by_folder(paths: list[PurePosixPath]) -> pytest.MarkDecorator:
    """One case for each top folder, of the ``paths`` in it: one for each file would take longer than what it does."""
    folders: dict[str, list[PurePosixPath]] = {}
    for path in paths:
        folders.setdefault(path.parts[0] if len(path.parts) > 1 else "root", []).append(path)
    return pytest.mark.parametrize("paths", list(folders.values()), ids=list(folders))


@cache
def parsed(path: PurePosixPath) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


@cache
def imported(path: PurePosixPath) -> tuple[tuple[str, int], ...]:
    """Each module a file imports, anywhere in it, relative ones written out from `onestep`; and the line."""
    return tuple(_imported(path))


def _imported(path: PurePosixPath) -> Iterator[tuple[str, int]]:
    package = ["onestep", *path.parent.parts]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [alias.name if module == "onestep" or is_ours(module, alias.name) else "" for alias in node.names]
            yield from ((f"{module}.{name}".rstrip("."), node.lineno) for name in names)


def is_ours(package: str, name: str) -> bool:
    """Whether ``name`` is a module of one of our packages."""
    return package.startswith("onestep.") and (ROOT / Path(*package.split(".")[1:]) / f"{name}.py").is_file()


def module_of(path: PurePosixPath) -> str:
    return ".".join(["onestep", *path.with_suffix("").parts]).removesuffix(".__init__")


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def trouble_with_import(path: PurePosixPath, module: str) -> str | None:
    """Why a shipped file may not import ``module``; None if it may."""
    folder, (top, *rest) = path.parts[0], module.split(".")
    if top == "onestep":
        room = path.parts[-2] if len(path.parts) > 2 else ""
        if folder == "training" and rest[:1] == ["training"] and room in ROOMS:
            known = ROOMS[room] | {room, "settings", "host"}
            return (
                None if not rest[1:] or rest[1] in known else f"training/{room} may import {sorted(known)} of training"
            )
        allowed = MAY_IMPORT.get(folder, set()) | {folder}
        return None if not rest or rest[0] in allowed else f"{folder} may import {sorted(allowed)} of ours"
    if top in FORBIDDEN_MODULES and (str(path), module) != (MAY_RUN_A_COMPILER, "subprocess"):
        return "is forbidden at run time"
    libraries = LIBRARIES.get(folder, set())
    return None if top in sys.stdlib_module_names or top in libraries else f"{folder} may import {sorted(libraries)}"


@by_folder(SHIPPED)
def test_imports_run_one_way(paths):
    read = [(path, line, module) for path in paths for module, line in imported(path)]
    found = [(path, line, module, trouble_with_import(path, module)) for path, line, module in read]
    assert [f"{path}:{line}: {module}: {why}" for path, line, module, why in found if why] == []


def test_no_import_leads_back_to_where_it_began():
    """Not by way of other modules either, and not inside of a function. A circle is in the error."""
    shipped = {module_of(path): {module for module, _ in imported(path)} for path in SHIPPED}
    graphlib.TopologicalSorter({name: uses - {name} for name, uses in shipped.items()}).prepare()


def test_a_compiler_is_started_by_hand_alone():
    """What may start one is imported by the command alone, which nothing imports."""
    for name, users in (("compile_cuda", ["kernels/__main__.py"]), ("__main__", [])):
        uses = [str(path) for path in SHIPPED if f"onestep.kernels.{name}" in {module for module, _ in imported(path)}]
        assert uses == users


@by_folder(SHIPPED)
def test_nothing_dangerous_runs(paths):
    assert [danger for path in paths for danger in dangers_of(path)] == []


def dangers_of(path: PurePosixPath) -> list[str]:
    found = []
    for node in ast.walk(parsed(path)):
        name = dotted(node.func) if isinstance(node, ast.Call) else ""
        if name in FORBIDDEN_NAMES or name in FORBIDDEN_CALLS:
            found.append(f"{path}:{node.lineno}: {name} {FORBIDDEN_CALLS.get(name, 'runs code')}")
        if isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "trust_remote_code"}:
            found += [f"{path}:{node.value.lineno}: {node.arg} must be False"] * (ast.unparse(node.value) != "False")
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"{path}:{node.lineno}: torch.{a.name}" for a in node.names if a.name in {"load", "save", "hub"}]
    return found


PUBLIC = {"torch.utils._python_dispatch.TorchDispatchMode"}
"""What torch documents under a private name, and under no other."""


def private_names(tree: ast.AST) -> set[str]:
    """Names of torch that a version may change without a word. Operators of torch.ops, by their names, are tried
    where they are used."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else {dotted(node)}
    ours = {name for name in names if name.startswith("torch.") and not name.startswith("torch.ops.")}
    return {name for name in ours - PUBLIC if any(re.match("_[^_]", part) for part in name.split("."))}


@by_folder(SHIPPED)
def test_nothing_private_of_torch_is_used(paths):
    assert [f"{path}: {name}" for path in paths for name in private_names(parsed(path))] == []


def test_these_checks_find_what_they_look_for():
    """A guard that cannot fail guards nothing."""
    for text in ("from torch.utils.checkpoint import _x", "import torch._dynamo", "torch._C._y()"):
        assert private_names(ast.parse(text))
    assert not private_names(ast.parse("torch.ops.aten._z(torch.__version__)"))
    inside = PurePosixPath("core/roles.py")
    assert trouble_with_import(inside, "onestep.training.engine")
    assert trouble_with_import(inside, "diffusers") and trouble_with_import(inside, "comfy.sd")
    assert trouble_with_import(PurePosixPath("nodes/x.py"), "onestep.pipelines")
    assert trouble_with_import(PurePosixPath("training/x.py"), "urllib.request")
    assert trouble_with_import(PurePosixPath("cli/x.py"), "onestep.nodes")
    assert trouble_with_import(PurePosixPath("training/engine/x.py"), "onestep.training.methods.dmd")
    assert trouble_with_import(PurePosixPath("training/data/x.py"), "onestep.training.methods")
    assert trouble_with_import(PurePosixPath("training/methods/x.py"), "onestep.training.data.pairs") is None
    assert {path.name for path in (ROOT / "training").iterdir() if path.is_dir()} - {"__pycache__"} == set(ROOMS)
    assert trouble_with_import(inside, "onestep.kernels.add_lora") is None
    reads = {module for module, _ in imported(PurePosixPath("core/adapted_layer.py"))}
    assert reads >= {"onestep.kernels.add_lora", "onestep.core.targets", "torch"}
    assert dotted(ast.parse("torch.hub.load(1)").body[0].value.func) == "torch.hub.load"


@by_folder(SOURCES)
def test_files_and_functions_are_read_in_one_sitting(paths):
    assert [long for path in paths for long in too_long(path)] == []


def too_long(path: PurePosixPath) -> Iterator[str]:
    lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
    if lines > MAX_FILE_LINES.get(path.parts[0], 300):
        yield f"{path} has {lines} lines: split it"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines: split it"


@by_folder(SOURCES)
def test_modules_say_their_job(paths):
    silent = [str(path) for path in paths if parsed(path).body and not ast.get_docstring(parsed(path))]
    assert silent == [], "no docstring: say its job in 1-5 lines"


def test_the_development_environment_is_whole():
    """Whatever tests, tools and benchmarks import is there: of the requirements, of the dev extra, or their own."""
    helpers = {path.stem for path in SOURCES} | {parent.name for path in SOURCES for parent in path.parents}
    modules = {module.split(".")[0] for path in SOURCES if path not in SHIPPED for module, _ in imported(path)}
    foreign = modules - helpers - COMFY - {"onestep", "tomli", "torchvision", "av", "triton"} - sys.stdlib_module_names
    assert [module for module in sorted(foreign) if importlib.util.find_spec(module) is None] == []


def test_every_file_is_known():
    by_name = [path for path in FILES if str(path) in ROOT_FILES or path.name == "LICENSE"]
    by_kind = [path for path in FILES if path.suffix in KNOWN_FILES.get(path.parts[0], set())]
    strangers = sorted(set(FILES) - set(by_name) - set(by_kind))
    assert strangers == [], "give these a place in KNOWN_FILES, or remove them"


def test_no_file_is_large():
    large = {str(path): (ROOT / path).stat().st_size for path in FILES}
    assert {path: size for path, size in large.items() if size > MAX_FILE_BYTES} == {}


def test_tests_are_no_packages():
    """With __init__.py files two test files of one name would share it."""
    assert [str(path) for path in SOURCES if path.parts[0] == "tests" and path.name == "__init__.py"] == []


# Where somebody's machine shows through. In pieces, so that this file does not hold them itself.
MACHINE = "|".join(
    [
        r"/wo" r"rk/(main|shared)",
        r"/ro" r"ot/",
        r"/ho" r"me/\w",
        r"/op" r"t/(pypi|wheels)",
        r"\.py" r"env",
        r"pypi\.o" r"rg",
        r"python" r"hosted\.org",
        r"download\.py" r"torch\.org",
        r"shared/" r"(facts|tools|data)",
    ]
)


@pytest.mark.parametrize("folder", ["", *sorted(KNOWN_FILES)])
def test_prose_is_about_the_product_alone(folder):
    """No path of a machine, no host of a package registry."""
    found = []
    here = [path for path in FILES if (path.parts[0] if len(path.parts) > 1 else "") == folder]
    for path in here:
        if path.suffix in {".safetensors", *PICTURES} or (ROOT / path).stat().st_size > 2**20:
            continue
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
            if re.search(MACHINE, line):
                found.append(f"{path}:{number}: {line.strip()[:100]}")
    assert found == []


def test_code_in_prose_is_in_blocks():
    """A line at a page's edge is read as prose."""
    for path in (path for path in FILES if path.suffix == ".md"):
        outside = re.sub(r"(?ms)^```.*?^```", "", (ROOT / path).read_text(encoding="utf-8"))
        assert re.findall(r"(?m)^(?:from \S+ import |import \w+$|\w+ = (?:[{(]|[\w.]+\()).*", outside) == [], path


WRAPPERS = ("core/families/", "pipelines/networks.py", "nodes/steer_networks.py")
"""Where a family's classes may be named: its own file, and the wrapper of its network in each host."""


def named_in(tree: ast.AST) -> set[str]:
    """Every name that code uses or imports, and every text that is one name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
        name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "value", None)
        found |= {name} if isinstance(name, str) else set()
    return found


def classes_of_families() -> set[str]:
    """Of networks and their blocks, in either host, as the families' files have them."""
    from onestep.core.families import FAMILIES
    from onestep.core.families.later import LATER

    found = {*LATER, *(name for known in FAMILIES.values() for name in (known.network, *known.blocks))}
    return found - {"Block"}  # ComfyUI's of Anima, and a record of ours


def test_a_family_is_named_in_one_place():
    """Elsewhere its facts are read from core.families."""
    elsewhere = [path for path in SHIPPED if not str(path).startswith(WRAPPERS)]
    found = {str(path): sorted(named_in(parsed(path)) & classes_of_families()) for path in elsewhere}
    assert {path: names for path, names in found.items() if names} == {}
    for text in (
        "from diffusers import FluxTransformer2DModel",
        'kinds = {"JointBlock"}',
        "x = a.UNet2DConditionModel",
    ):
        assert named_in(ast.parse(text)) & classes_of_families()
    assert not named_in(ast.parse('"""Of a UNet2DConditionModel."""\nx = "the JointBlock"')) & classes_of_families()
