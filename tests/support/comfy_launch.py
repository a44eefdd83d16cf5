"""Run a script, or ComfyUI's own main.py, in ComfyUI's Python on the CPU.

Where torch is a CPU build but torchvision a CUDA wheel, torchvision cannot load its compiled half and then fails to
import because two of its ops were never declared. Declaring them is enough for everything that is plain Python.

    python comfy_launch.py COMFYUI main.py --cpu ...
    python comfy_launch.py COMFYUI /path/of/a/script.py arguments
    python comfy_launch.py COMFYUI forks
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import sys
from pathlib import Path

import forks

PACK = Path(__file__).resolve().parents[2]


def declare_torchvision_ops() -> None:
    """Leave a torchvision that imports alone; give one that does not the declarations it misses."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_torchvision_ops"] = library  # the declarations die with the object


def import_pack() -> None:
    """Make the checkout importable as `onestep`, whatever its folder is called, without putting it on sys.path."""
    if "onestep" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "onestep", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["onestep"] = module
    spec.loader.exec_module(module)


def import_comfy() -> None:
    """CPU only: ComfyUI reads its switches from sys.argv when `comfy` is first imported."""
    sys.argv = [sys.argv[0], "--cpu", "--use-pytorch-cross-attention"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401

    import_pack()


def become(arguments: list[str]) -> None:
    """Run a script as the program."""
    sys.argv = arguments
    runpy.run_path(sys.argv[0], run_name="__main__")


def start(root: Path, script: str, arguments: list[str]) -> None:
    """Become ComfyUI (script is main.py), or a CPU-only ComfyUI process that runs a test script, or one that forks to
    run many."""
    sys.path[0] = str(root)
    os.chdir(root)
    declare_torchvision_ops()
    if script == "main.py":
        return become([str(root / script), *arguments])
    import_comfy()
    if script != "forks":
        return become([script, *arguments])
    for heavy in ("comfy.sd", "comfy.sample", "torch._dynamo"):
        importlib.import_module(heavy)

    forks.serve(become)


if __name__ == "__main__":
    start(Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3:])
