"""onestep doctor: what is installed, what works, and why something does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from .console import Console

# name, and what it is good for
PACKAGES = {
    "torch": "needed",
    "diffusers": "needed outside of ComfyUI",
    "transformers": "needed outside of ComfyUI",
    "peft": "needed outside of ComfyUI, where LoRA files are checked",
    "safetensors": "needed by diffusers",
    "xformers": "optional: attention in less memory",
    "triton": "optional: comes with torch on Linux with a GPU",
    "bitsandbytes": "optional: optimiser states of 8 bits",
}
LOWEST_TORCH = "2.6"
"""The oldest that tools/torch_versions.py finds to work, and that diffusers and transformers still take."""
ROOT = Path(__file__).resolve().parents[1]


def run(args: Namespace, console: Console) -> None:
    facts = examine()
    console.result(told(facts), facts)


def examine() -> dict[str, Any]:
    """Everything that is looked at."""
    import torch

    from ..kernels.attention import backends
    from ..kernels.ops import states
    from ..pipelines.bundled import NAMES

    return {
        "onestep": {"version": version("onestep-diffusion") or "not installed by pip", "folder": str(ROOT)},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: version(name) for name in PACKAGES},
        "torch": torch_trouble(torch.__version__),
        "devices": devices(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "attention": backends(),
        "ops": states(),
        "optimizer_8bit": eight_bit(),
        "bundled": {name: found_bundled(name) for name in NAMES},
        "comfyui": comfyui(),
    }


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_trouble(found: str) -> str | None:
    """What is wrong with this version of torch; None where nothing is."""
    numbers = [tuple(int(part) for part in re.findall(r"\d+", text)[:2]) for text in (found, LOWEST_TORCH)]
    if numbers[0] >= numbers[1]:
        return None
    return f"too old: OneStep needs torch {LOWEST_TORCH} or newer, of a build that fits your card"


def devices() -> list[dict[str, Any]]:
    """The CPU, and every GPU that torch can use."""
    import torch

    found: list[dict[str, Any]] = [{"name": "cpu", "title": platform.processor() or platform.machine()}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        title = torch.cuda.get_device_name(index)
        found.append({"name": f"cuda:{index}", "title": title, "memory_bytes": total, "free_bytes": free})
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "title": "Apple GPU"})
    return found


def eight_bit() -> str:
    """Whether AdamW's states can have 8 bits, or why not."""
    import torch

    if version("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    try:
        importlib.import_module("bitsandbytes")
    except Exception as error:  # whatever a foreign library does on import
        return f"bitsandbytes does not load: {str(error).strip().splitlines()[0][:150]}"
    return "works"


def found_bundled(name: str) -> str:
    """Where a bundled model is, or that it is missing."""
    folder = ROOT / "pipelines" / "tiny" / name
    return str(folder) if any(folder.glob("*.json")) else "missing"


def comfyui() -> list[dict[str, Any]]:
    """Every ComfyUI where one is looked for, in that order."""
    told_folder = os.environ.get("COMFYUI_DIR")
    places = [Path(told_folder)] if told_folder else []
    places += [ROOT.parents[1]] if ROOT.parent.name == "custom_nodes" else []
    places.append(Path.home() / "comfy" / "ComfyUI")
    return [{"folder": str(place), **comfyui_at(place)} for place in dict.fromkeys(places)]


def comfyui_at(folder: Path) -> dict[str, Any]:
    if not (folder / "comfy").is_dir():
        return {"version": None, "pack": "no ComfyUI is here"}
    text = folder / "comfyui_version.py"
    found = re.search(r"__version__\s*=\s*[\"']([^\"']+)", text.read_text(encoding="utf-8")) if text.is_file() else None
    inside = ROOT.parent.resolve() == (folder / "custom_nodes").resolve()
    pack = "this pack is in its custom_nodes" if inside else "this pack is not in its custom_nodes"
    return {"version": found[1] if found else "unknown", "pack": pack}


def memory_bytes() -> int | None:
    """Main memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def told(facts: dict[str, Any]) -> str:
    """The same for a person."""
    memory = f"{facts['memory_bytes'] / 2**30:.0f} GiB memory, " if facts["memory_bytes"] else ""
    lines = [
        f"onestep {facts['onestep']['version']} in {facts['onestep']['folder']}",
        f"Python {facts['python']} on {facts['system']}, {memory}{facts['free_disk_bytes'] / 2**30:.0f} GiB free here",
        "packages",
        *(_line(name, _package(name, good, facts)) for name, good in PACKAGES.items()),
        "devices",
        *(_line(entry["name"], _device(entry, facts["threads"])) for entry in facts["devices"]),
        "attention",
        *(_line(name, state) for name, state in facts["attention"].items()),
        "ops (ONESTEP_KERNELS=auto, reference, triton or cuda)",
        *(_line(name, state) for name, state in facts["ops"].items()),
        "optimiser states of 8 bits",
        _line("AdamW", facts["optimizer_8bit"]),
        "bundled models",
        *(_line(name, place) for name, place in facts["bundled"].items()),
        "ComfyUI",
        *(_line(entry["version"] or "-", f"{entry['folder']}: {entry['pack']}") for entry in facts["comfyui"]),
    ]
    return "\n".join(lines)


def _package(name: str, good: str, facts: dict[str, Any]) -> str:
    """Its version and what is wrong with it, or that it is missing and what it is good for."""
    trouble = facts["torch"] if name == "torch" else None
    told = facts["packages"][name] or f"not installed ({good})"
    return f"{told}, {trouble}" if trouble else told


def _device(entry: dict[str, Any], threads: int) -> str:
    if entry["name"] == "cpu":
        return f"{entry['title']}, {threads} threads"
    memory = f", {entry['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in entry else ""
    return f"{entry['title']}{memory}"


def _line(name: str, text: str) -> str:
    return f"  {name:<14} {text}" if len(name) > 13 else f"  {name:<14}{text}"
