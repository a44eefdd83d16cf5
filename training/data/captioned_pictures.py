"""A person's own pictures with their captions: each in a bucket of about its own shape, encoded once and kept in the
run's folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ...core import randomness
from ...core.errors import OneStepError
from ...core.memory import notice
from ...core.sending import sent
from ...core.tensor_file import map_tensors, write_tensors
from ...core.whole_file import write_whole
from ..engine import processes
from ..engine.batch import Batch
from ..engine.prompts import LONGEST, Prompts, Size, check_prompts, embed
from ..engine.setup import Setup
from ..host import Host
from ..settings import Settings
from .real_pictures import encoded, pictures_in, read

NAME = "pictures"
CUT = 0.4
"""Of a picture's area, the most that its bucket may leave out."""
WIDEST = 2.0
"""Of a bucket, width over height or the other way round."""
STEP, LEAST_STEP = 64, 16
"""Between buckets, in pixels: the first where a side is 512 or more."""
FOLDER, LIST = "pictures", "pictures.json"


@dataclass(frozen=True)
class Captioned:
    """A picture: its file, what it shows in words, and the size (width, height) at which it is learnt from."""

    path: Path
    caption: str
    size: Size


def captioned(host: Host, settings: Settings) -> list[Captioned]:
    """The pictures of the run's folder, each with the text of the .txt file of its name, or the run's ``caption``.
    Raises OneStepError for a picture without a caption, or whose shape fits no bucket."""
    own = settings.own
    paths = pictures_in(own.pictures, NAME, "")
    captions = check_prompts([_caption(path, own.caption) for path in paths])
    sizes = [size for size in buckets(settings.size_list) if _is_drawn(host, size)]
    return [Captioned(path, caption, _bucket(path, sizes)) for path, caption in zip(paths, captions, strict=True)]


def _is_drawn(host: Host, size: Size) -> bool:
    """Whether the model takes pictures of ``size``: the sides of some are multiples of 32."""
    try:
        return bool(host.latent_shape(size))
    except OneStepError:
        return False


def _caption(path: Path, otherwise: str) -> str:
    beside = path.with_suffix(".txt")
    try:
        text = beside.read_text(encoding="utf-8-sig").strip() if beside.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "") or "it is no UTF-8 text"
        raise OneStepError(f"the caption {beside.name[:100]!r} cannot be read ({why}): save it as UTF-8 text") from None
    if not (text or otherwise):
        raise OneStepError(
            f"the picture {path.name[:100]!r} has no caption: write what it shows into {beside.name[:100]!r} beside "
            "it, or set caption to one for all pictures without their own"
        )
    if len(text) > LONGEST:
        raise OneStepError(
            f"the caption {beside.name[:100]!r} has {len(text)} characters, more than {LONGEST}: {text[:40]!r}... "
            "Shorten it"
        )
    return " ".join((text or otherwise).split())


# -- buckets ----------------------------------------------------------------------------------------------------------


def buckets(around: Sequence[Size]) -> list[Size]:
    """The run's sizes, and every size of the first one's area at most, a step less in height than would pass it, from
    `WIDEST` to its inverse."""
    width, height = around[0]
    side = math.sqrt(width * height)
    step = STEP if side >= 512 else max(LEAST_STEP, 16 * round(side / 128))
    found = list(around)
    for w in range(step, int(side * math.sqrt(WIDEST)) + 1, step):
        h = int(width * height / w) // step * step
        if h and 1 / WIDEST <= w / h <= WIDEST:
            found.append((w, h))
    return list(dict.fromkeys(found))


def _bucket(path: Path, sizes: Sequence[Size]) -> Size:
    with read(path, NAME) as image:
        width, height = image.size
    shape = math.log(width / height)
    best = min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - shape))
    # what is left of a picture cut to another shape: the smaller of the two shapes over the larger
    if 1 - math.exp(-abs(math.log(best[0] / best[1]) - shape)) > CUT:
        raise OneStepError(
            f"the picture {path.name[:100]!r} is {width}x{height}: of the sizes around the run's the nearest in shape "
            f"is {best[0]}x{best[1]}, which would cut more than {CUT:.0%} of it away. Crop it, take it out, or add a "
            "size of its shape to sizes"
        )
    return best


# -- in a run ---------------------------------------------------------------------------------------------------------


@dataclass
class CaptionedPictures:
    """Latents and conditions of ``settings.own.pictures``, in the run's folder. What a run has begun with it keeps,
    whatever becomes of the folder."""

    setup: Setup
    _latents: dict[Size, Tensor] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.setup.folder / FOLDER

    @cached_property
    def every(self) -> list[Captioned]:
        """In the order of their names."""
        path = self.folder / LIST
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            told = [[str(one.path), one.caption, *one.size] for one in captioned(self.setup.host, self.setup.settings)]
            write_whole(path, [json.dumps(told, indent=1).encode()])
        told = json.loads(path.read_bytes())
        return [Captioned(Path(file), caption, (width, height)) for file, caption, width, height in told]

    @cached_property
    def texts(self) -> Prompts:
        """The captions' conditions at every size that a picture has, and at the run's first. What stands for a picture
        without its caption is an empty text: the run's negative says what pictures should not be like."""
        settings = self.setup.settings
        sizes = dict.fromkeys([settings.size_list[0], *(one.size for one in self.every)])
        told = settings.with_(sizes=",".join(f"{width}x{height}" for width, height in sizes), negative="")
        return embed(self.setup.host, [one.caption for one in self.every], told, self.folder / "captions")

    def draw(self, batch: Batch) -> tuple[Batch, Tensor]:
        """(samples like ``batch`` of one bucket under their captions, their latents [B, C, h, w]). Each picture is as
        likely as every other."""
        size, at = self.choose(batch)
        return self.under_captions(batch, size, at), sent(self.latents_of(size)[at], batch.device)

    def choose(self, batch: Batch) -> tuple[Size, Tensor]:
        """(the bucket of all samples, which of its pictures each is)."""
        size = self.every[batch.choice(len(self.every), "picture's bucket")].size
        rows = self.in_bucket(size)
        return size, randomness.integers(len(rows), batch.seed, "picture", batch.step, batch.samples)

    def in_bucket(self, size: Size) -> list[int]:
        """Which of `every` it holds."""
        return [row for row, one in enumerate(self.every) if one.size == size]

    def under_captions(self, batch: Batch, size: Size, at: Tensor) -> Batch:
        """Samples like ``batch`` of the bucket's pictures ``at``."""
        return self.texts.of(size, torch.tensor(self.in_bucket(size))[at], batch.step, batch.samples)

    def at_first_size(self, rows: Sequence[int]) -> Tensor:
        """[N, C, h, w] on the CPU: pictures cut to the run's first size, which previews have."""
        once, at = torch.tensor(rows).unique(return_inverse=True)
        paths = [self.every[row].path for row in once.tolist()]
        return encoded(self.setup.host, paths, self.setup.settings.size_list[0], NAME)[at]

    def latents_of(self, size: Size) -> Tensor:
        """The latents of a bucket, in the order of their names."""
        if size not in self._latents:
            path = self.folder / f"{size[0]}x{size[1]}.safetensors"
            if not path.is_file():
                paths = [one.path for one in self.every if one.size == size]
                write_tensors(path, {"x": encoded(self.setup.host, paths, size, NAME)})
            self._latents[size] = map_tensors(path)["x"]
        return self._latents[size]

    def prepare(self) -> None:
        """Encode all of it now: a fault of one picture is known before a night has passed. Of several processes the
        first does it; what asks later, maybe in one of them alone, finds it made. Says what is no longer in the
        person's folder as the run has it."""
        if (self.folder / LIST).is_file() and (change := self._change()):
            notice(f"the run goes on with the pictures and captions that it began with: {change}")
        with processes.first_alone():
            for size in dict.fromkeys(one.size for one in self.every):
                self.latents_of(size)
            self.texts  # noqa: B018  (read once)

    def _change(self) -> str:
        """How the person's folder differs from what the run has of it, in words; "" where it does not."""
        try:
            now = {one.path.name: one.caption for one in captioned(self.setup.host, self.setup.settings)}
        except OneStepError as error:
            return f"now {error}"
        kept = {one.path.name: one.caption for one in self.every}
        told = {
            "missing": kept.keys() - now.keys(),
            "new": now.keys() - kept.keys(),
            "captioned otherwise": {name for name in kept.keys() & now.keys() if kept[name] != now[name]},
        }
        words = ", ".join(f"{len(names)} {what} ({min(names)[:60]!r})" for what, names in told.items() if names)
        return f"in the folder there are now {words}. Begin another run to learn from it as it is" if words else ""
