"""The network of a few-step checkpoint, a diffusers folder or a single file, of which a tensor at a time is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..core.errors import OneStepError
from ..core.targets import Target
from ..core.tensor_file import Header, read_header, read_tensor
from . import single_file
from .load import located
from .single_marks import prediction_in
from .single_names import Source
from .single_parts import empty, places_of
from .single_scaled import Scales, scales_of
from .weights import STEMS, best_variant, variants


class Network(Protocol):
    @property
    def prediction(self) -> str:
        """What it answers, as the checkpoint says; "" where nothing does."""
        ...

    def names(self) -> set[str]:
        """Of its tensors, as diffusers calls them."""
        ...

    def read(self, name: str) -> Tensor:
        """One of them, in memory of its own."""
        ...


@dataclass(frozen=True)
class FolderNetwork:
    """files: which file a tensor lies in, and that file's header."""

    files: dict[str, tuple[Path, Header]]
    prediction: str

    def names(self) -> set[str]:
        return set(self.files)

    def read(self, name: str) -> Tensor:
        return read_tensor(*self.files[name], name)


@dataclass(frozen=True)
class FileNetwork:
    """places: what of the file is a tensor of the network; shapes: of these, as diffusers has them."""

    path: Path
    header: Header
    places: dict[str, Source]
    shapes: dict[str, tuple[int, ...]]
    scales: Scales
    prediction: str

    def names(self) -> set[str]:
        return set(self.places)

    def read(self, name: str) -> Tensor:
        source = self.places[name]
        stored = read_tensor(self.path, self.header, source.key)
        return source.take(self.scales.widened(source.key, stored)).reshape(self.shapes[name])


class FewStep:
    """The network of a few-step checkpoint of the pipeline ``base``, by the base's names."""

    def __init__(self, model: str | Path, base: Any) -> None:
        path, part = located(model), "unet" if hasattr(base, "unet") else "transformer"
        self.name = path.name
        dtype = getattr(base, part).dtype
        self._network: Network = network_in(path / part, dtype) if path.is_dir() else network_of_file(path)
        self.prediction = self._network.prediction

    def names(self) -> set[str]:
        return self._network.names()

    def tensor(self, name: str) -> Tensor:
        """As it is stored. Raises OneStepError where there is none."""
        if name not in self.names():
            raise OneStepError(f"{self.name[:80]} has no {name}: give a checkpoint of the same base")
        return self._network.read(name)

    def weight(self, target: Target) -> Tensor:
        return self.tensor(f"{target.name}.weight").float()


def network_in(folder: Path, dtype: Any) -> FolderNetwork:
    """Of a folder of a diffusers folder, from the files that `load` would take for ``dtype``."""
    if not folder.is_dir():
        raise OneStepError(
            f"{folder.parent.name[:80]} has no folder {folder.name!r}: give two checkpoints of one base, each a "
            "diffusers folder or a single file"
        )
    stem = STEMS["diffusers"]
    files = [folder / name for name in variants(folder, stem)[best_variant(folder, stem, dtype)]]
    headers = {file: read_header(file) for file in files}
    places = {name: (file, header) for file, header in headers.items() for name in header.tensors}
    return FolderNetwork(places, _prediction_in(folder.parent))


def network_of_file(path: Path) -> FileNetwork:
    """Of a single file of SD1.5, SD2 or SDXL. Raises OneStepError, with what it is instead, for every other file."""
    header = read_header(path)
    scales = scales_of(path, header)
    parts = scales.without(header)
    kind = single_file.kind_of(path, parts)
    folder, part = single_file.CONFIGS / kind.config, single_file.parts_of(kind)[0]
    shapes = {name: tuple(weight.shape) for name, weight in empty(folder, part.name).state_dict().items()}
    v = prediction_in(path, parts, kind.config == "sd2").v
    places = places_of(path, parts, part, folder)
    return FileNetwork(path, header, places, shapes, scales, "v_prediction" if v else "epsilon")


def _prediction_in(folder: Path) -> str:
    """What the scheduler of a diffusers folder says that its network answers; "" where it says nothing."""
    try:
        told = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        return str(told.get("prediction_type", ""))
    except (OSError, ValueError, AttributeError):
        return ""
