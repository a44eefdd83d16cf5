"""Which of several students draws a prompt: the one whose centroid lies nearest to what the text is summed up as."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .cond import Cond
from .errors import OneStepError
from .recipe import Recipe, step_files
from .tensor_file import read_header, read_tensors, write_tensors

CENTROIDS, STUDENTS, FAMILY = "centroids", "onestep.students", "onestep.family"
ENDING = "-router"
"""After the name of the first student's file."""


@dataclass(frozen=True)
class Router:
    """centroids: [K, P] of `Cond.summary`, float32, on the CPU."""

    centroids: Tensor

    def __len__(self) -> int:
        return len(self.centroids)

    def of(self, cond: Cond) -> list[int]:
        """Of each text the student k that has the least |summary - c_k|^2, the first of equals. A condition without
        numbers, on the meta device, is the first one's."""
        summary = cond.summary.detach()
        return [0] * len(cond) if summary.is_meta else self.nearest(summary.cpu()).tolist()

    def nearest(self, summary: Tensor) -> Tensor:
        """The same of summaries [B, P]."""
        if summary.shape[1] != self.centroids.shape[1]:
            raise OneStepError(
                f"the router knows texts of {self.centroids.shape[1]} numbers, and this model's have "
                f"{summary.shape[1]}: load the students into the base that they were made for"
            )
        return (summary.double()[:, None] - self.centroids.double()).square().sum(2).argmin(1)


@dataclass(frozen=True)
class Students:
    """A router's file: files[k] is the LoRA of its student k, beside it."""

    router: Router
    files: tuple[Path, ...]
    family: str


def router_file(first: Path) -> Path:
    """Where the router of the students lies whose first one's file is ``first``."""
    return first.with_name(f"{first.stem}{ENDING}{first.suffix}")


def save_router(path: Path, router: Router, names: Sequence[str], family: str) -> str:
    """Write it, and read it back; what was proven, in words."""
    told = {STUDENTS: json.dumps(list(names)), FAMILY: family}
    write_tensors(path, {CENTROIDS: router.centroids}, told)
    found = load_students(path)
    if not torch.equal(found.router.centroids, router.centroids) or [file.name for file in found.files] != [*names]:
        raise OneStepError(f"{path.name[:80]} does not hold the router that was written: please report it")
    return f"{path.name} tells {len(names)} students apart"


def is_router(path: Path) -> bool:
    """Whether ``path`` is a router's file, by its header."""
    return path.suffix == ".safetensors" and path.is_file() and STUDENTS in read_header(path).metadata


def refuse_router(path: Path, metadata: Mapping[str, str]) -> None:
    """Raises OneStepError for a router's file where a LoRA's is wanted."""
    if STUDENTS in metadata:
        raise OneStepError(
            f"{path.name[:80]} tells students apart and is no LoRA: choose that of one student here; "
            "OneStepPipeline.load_one_step_lora and `onestep generate --lora` take it, and draw each prompt with its "
            "own"
        )


def run_files(first: Path, recipe: Recipe) -> list[Path]:
    """All that a run has written as its result, the first file first: of each step, or of each student and what tells
    them apart."""
    router = router_file(first)
    if not router.is_file():
        return step_files(first, recipe)
    return [*load_students(router).files, router]


def load_students(path: Path) -> Students:
    """The router of a file, and where its students lie: beside it under their names, or renamed together. Raises
    OneStepError for a file that is none, or is damaged."""
    told, wrong = read_header(path).metadata, f"{path.name[:80]} holds no router of students"
    try:
        names = json.loads(told.get(STUDENTS, ""))
    except (ValueError, RecursionError):
        names = None
    tensors = read_tensors(path)
    centroids = tensors.get(CENTROIDS, torch.empty(0))
    plain = isinstance(names, list) and all(isinstance(name, str) and Path(name).name == name for name in names)
    if not plain or centroids.ndim != 2 or len(centroids) != len(names) or not bool(centroids.isfinite().all()):
        raise OneStepError(f"{wrong}: choose the file that the run has named result{ENDING}.safetensors")
    return Students(Router(centroids.float()), _beside(path, names), told.get(FAMILY, ""))


def _beside(path: Path, names: Sequence[str]) -> tuple[Path, ...]:
    first = Path(names[0]).stem
    own = path.stem.removesuffix(ENDING)
    return tuple(path.with_name(own + name.removeprefix(first) if own != path.stem else name) for name in names)
