"""Libraries that were carried to a machine without a network: wheels beside this script, unpacked for one run.

    python benchmarks/gpu/wheels.py benchmarks/gpu/wheels 13.0      # before: leave bitsandbytes one library of its own

A wheel is a zip of a package; unpacked into a folder of the import path it is there, and nothing is installed.
"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent / "wheels"


def unpack(wheels: Path, into: Path) -> list[str]:
    """Put what is in the folder ``wheels`` at the end of the import path, behind what the machine has; the names of the
    wheels."""
    found = sorted(wheels.glob("*.whl"))
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
    if found:
        sys.path.append(str(into))
    return [wheel.name for wheel in found]


def slim(wheel: Path, cuda: str) -> Path:
    """A wheel of bitsandbytes with the library for one version of CUDA ("13.0") alone, of sixteen; it replaces the
    other. ValueError where it has none."""
    keep = f"bitsandbytes/libbitsandbytes_cuda{cuda.replace('.', '')}.so"
    slimmed = wheel.with_suffix(".slim")
    with zipfile.ZipFile(wheel) as old:
        if keep not in old.namelist():
            raise ValueError(f"{wheel.name} has no {keep.split('/')[1]}: it has {', '.join(_libraries(old))}")
        with zipfile.ZipFile(slimmed, "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.infolist():
                if not re.search(r"_(cuda|rocm|xpu)\d+\.so$", entry.filename) or entry.filename == keep:
                    new.writestr(entry, old.read(entry), zipfile.ZIP_DEFLATED)
    slimmed.replace(wheel)
    return wheel


def _libraries(archive: zipfile.ZipFile) -> list[str]:
    return sorted(found for name in archive.namelist() for found in re.findall(r"_cuda(\d+)\.so$", name))


if __name__ == "__main__":
    folder, version = Path(sys.argv[1]), sys.argv[2]
    for file in folder.glob("bitsandbytes-*.whl"):
        slim(file, version)
    print(f"{sum(file.stat().st_size for file in folder.glob('*.whl')) / 1e6:.1f} MB in {folder}")
