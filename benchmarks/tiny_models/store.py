"""Model folders as they are shipped: 16-bit weights, to be read as 32-bit."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from . import tokens


def save(pipe: DiffusionPipeline, folder: Path) -> None:
    """Write the pipeline to folder (replaced whole) with its weights rounded to float16."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    pipe.save_pretrained(new, safe_serialization=True)
    for part in new.glob("tokenizer*"):
        tokens.save(getattr(pipe, part.name), part)
    for path in new.rglob("*.safetensors"):
        halve(path)
    for path in new.rglob("config.json"):
        forget_origin(path)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def halve(path: Path) -> None:
    """Round the weights of a safetensors file to float16 in place."""
    save_file({name: tensor.half().contiguous() for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def forget_origin(path: Path) -> None:
    """Take the folder that a network was once read from out of its config.json."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("_name_or_path", None):
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def hashes(root: Path) -> dict[str, str]:
    """sha256 of every weight file below root, by its path from there."""
    files = sorted(root.rglob("*.safetensors"))
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def size_bytes(folder: Path) -> int:
    """Bytes of all files below folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
