"""A person's own pictures as what is real, encoded once and kept in the run's folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...core import randomness
from ...core.errors import OneStepError
from ...core.memory import Slices
from ...core.tensor_file import map_tensors, write_tensors
from ..engine import processes
from ..engine.batch import Batch
from ..engine.prompts import Size
from ..engine.setup import Setup
from ..host import Host

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
AT_ONCE = 4
"""Pictures that are encoded together."""
NAME, OTHERWISE = "real_pictures", ", or leave it empty for the teacher's own"


def pictures_in(told: str, name: str = NAME, otherwise: str = OTHERWISE) -> list[Path]:
    """The pictures of the folder ``told``, in the order of their names. name: of the setting that tells it; otherwise:
    what it may be instead. Raises OneStepError where there are none."""
    folder = Path(told).expanduser()
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())
    except OSError as error:
        raise OneStepError(
            f"{name} is {told[-150:]!r}, which is no folder that can be read ({error.strerror}): give a folder "
            f"of pictures{otherwise}"
        ) from None
    if not found:
        raise OneStepError(
            f"{name} is {told[-150:]!r}, a folder with no pictures in it ({', '.join(ENDINGS)}): put some "
            f"there{otherwise}"
        )
    return found


@contextmanager
def read(path: Path, name: str = NAME) -> Iterator[Image.Image]:
    """Within, the picture as its camera was held. Raises OneStepError where it cannot be read."""
    try:
        with Image.open(path) as image:
            yield ImageOps.exif_transpose(image)
    except Exception as error:  # a broken file may raise anything: PIL's readers are many
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        raise OneStepError(
            f"the picture {path.name[:100]!r} of {name} cannot be read ({why}): repair it or take it out"
        ) from None


def opened(path: Path, size: Size, name: str = NAME) -> Tensor:
    """[3, H, W] in [0, 1]: the picture's middle at ``size`` (width, height), as large as it covers that."""
    with read(path, name) as image:
        fitted = ImageOps.fit(_of_8_bits(image).convert("RGB"), size, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255


def _of_8_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits at 8, which PIL's own conversion would cut off at 255."""
    deep = image.mode == "I" or image.mode.startswith("I;16")
    return Image.fromarray((np.array(image) / 257).round().clip(0, 255).astype(np.uint8)) if deep else image


def encoded(host: Host, paths: Sequence[Path], size: Size, name: str = NAME) -> Tensor:
    """[N, C, h, w] float32 on the CPU: the latents of pictures at ``size``."""

    @torch.no_grad()
    def encode(rows: list[int]) -> Tensor:
        host.poll()
        return host.latents_of(torch.stack([opened(paths[row], size, name) for row in rows])).float().cpu()

    return torch.cat(Slices(AT_ONCE, "your pictures")(range(len(paths)), encode))


@dataclass
class RealPictures:
    """Latents of ``settings.own.real_pictures`` at each size of the run. Any of them may stand beside any of the
    student's: nobody has told what they show, so both are looked at without a prompt, or under another's."""

    setup: Setup
    folder: Path
    _latents: dict[Size, Tensor] = field(default_factory=dict)

    def prepare(self) -> None:
        """Encode what is not kept yet."""
        with processes.first_alone():
            for size in self.setup.prompts.sizes:
                path = self._path(size)
                if not path.is_file():
                    self.folder.mkdir(parents=True, exist_ok=True)
                    paths = pictures_in(self.setup.settings.own.real_pictures)
                    write_tensors(path, {"x": encoded(self.setup.host, paths, size)})

    def draw(self, batch: Batch, update: int) -> tuple[Batch, Tensor]:
        """(``batch``, as many latents [B, C, h, w] of its size)."""
        size = self._size(batch)
        if size not in self._latents:
            self._latents[size] = map_tensors(self._path(size))["x"]
        known = self._latents[size]
        rows = randomness.integers(len(known), batch.seed, "real picture", batch.step, batch.samples)
        return batch, known[rows].to(batch.device)

    def looked_at(self, batch: Batch) -> Batch:
        """``batch`` under the null condition; of a base that has none, under prompts that are nobody's."""
        nulls = batch.nulls()
        if nulls is None:
            prompts, size = self.setup.prompts, self._size(batch)
            rows = randomness.integers(len(prompts), batch.seed, "real prompt", batch.step, batch.samples)
            nulls = prompts.of(size, rows, batch.step, batch.samples).cond
        return replace(batch, cond=nulls)

    def _size(self, batch: Batch) -> Size:
        return next(size for size, shape in self.setup.prompts.shapes.items() if shape == batch.shape)

    def _path(self, size: Size) -> Path:
        return self.folder / f"{size[0]}x{size[1]}.safetensors"
