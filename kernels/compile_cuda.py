"""Build the kernels in CUDA C++: by hand alone, with `python -m onestep.kernels build`; nothing else starts a compiler.

torch's stable ABI makes one library for every torch from 2.10 on, and needs its headers and NVIDIA's nvcc, no more.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from .library import LIBRARY

SOURCES = sorted(Path(__file__).parent.glob("*.cu"))
OLDEST = (2, 10)
USUAL = ("75", "86", "89", "120")
"""Where no card is found and none is named: Turing, Ampere, Ada and Blackwell as they are sold to people."""


class BuildError(Exception):
    """What is missing or went wrong, for a person."""


def build(archs: Sequence[str] = ()) -> Path:
    """Compile all sources into one library for ``archs`` ("86"), or the cards found; where it is. BuildError."""
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < OLDEST:
        raise BuildError(f"torch is {torch.__version__}: its stable ABI begins with 2.10, update torch")
    bad = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[a-z]?", arch)]
    if bad:
        raise BuildError(f"no such architecture: {bad[0]!r:.40}; write 86 for compute capability 8.6")
    LIBRARY.parent.mkdir(exist_ok=True)
    fresh = LIBRARY.with_name(f"new-{LIBRARY.name}")
    done = subprocess.run(command(nvcc(), archs or cards(), fresh), capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"nvcc failed:\n{(done.stderr or done.stdout).strip()[-3000:]}")
    os.replace(fresh, LIBRARY)
    return LIBRARY


def cards() -> tuple[str, ...]:
    """The architectures of the cards here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = {"".join(map(str, torch.cuda.get_device_capability(index))) for index in range(count)}
    return tuple(sorted(found)) or USUAL


def nvcc() -> Path:
    """Of CUDA_HOME, of the PATH, or of NVIDIA's wheels beside torch."""
    name = "nvcc.exe" if os.name == "nt" else "nvcc"
    places = [Path(os.environ["CUDA_HOME"]) / "bin" / name] if os.environ.get("CUDA_HOME") else []
    places += [Path(path)] if (path := shutil.which("nvcc")) else []
    wheels = importlib.util.find_spec("nvidia")
    for folder in wheels.submodule_search_locations or [] if wheels else []:
        places += sorted(Path(folder).glob(f"cu*/bin/{name}"))
    for place in places:
        if place.is_file():
            return place
    raise BuildError("nvcc was not found: install NVIDIA's CUDA toolkit, or name its folder in CUDA_HOME")


def command(compiler: Path, archs: Sequence[str], out: Path) -> list[str]:
    """What is run. The last architecture's PTX serves newer cards."""
    base, toolkit = Path(torch.__file__).parent, compiler.parent.parent
    flags = ["-std=c++17", "-O3", "-shared", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    flags += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
    flags += [f"-I{folder}" for folder in (base / "include", toolkit / "include") if folder.is_dir()]
    flags += [f"-L{folder}" for folder in (base / "lib", toolkit / "lib", toolkit / "lib64") if folder.is_dir()]
    flags += [] if os.name == "nt" else ["-Xcompiler", "-fPIC"]
    return [str(compiler), *flags, "-o", str(out), *map(str, SOURCES), "-ltorch_cpu", "-lc10"]
