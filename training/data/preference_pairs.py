"""A person's pairs of pictures: of two under one caption the better one and the worse, encoded once and kept in the
run's folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ...core.errors import OneStepError
from ...core.memory import notice
from ...core.sending import sent
from ...core.tensor_file import map_tensors, write_tensors
from ..engine import processes
from ..engine.batch import Batch
from ..engine.prompts import Size
from ..engine.setup import Setup
from ..host import Host
from ..settings import Settings
from .captioned_pictures import NAME, CaptionedPictures, captioned
from .real_pictures import encoded, pictures_in

BETTER, WORSE = "better", "worse"
"""The two folders within a person's."""


def of_better(settings: Settings) -> Settings:
    """The settings of which the pictures are the better ones."""
    return settings.with_(pictures=str(Path(settings.own.pictures) / BETTER))


def check_pairs(host: Host, settings: Settings) -> None:
    """Raises OneStepError for a folder without both halves, a picture without its partner, a pair of equal files, and
    what `captioned` refuses."""
    told = Path(settings.own.pictures).expanduser()
    missing = [name for name in (BETTER, WORSE) if told.is_dir() and not (told / name).is_dir()]
    if missing:
        raise OneStepError(
            f"pictures is {settings.own.pictures[-150:]!r}, in which there is no folder {missing[0]}: of each pair put "
            f"the picture that you prefer into {BETTER} and the other one, under the same name, into {WORSE}"
        )
    partners(settings, [one.path for one in captioned(host, of_better(settings))])


def partners(settings: Settings, better: Sequence[Path]) -> list[Path]:
    """The worse picture of each of these better ones: the one of the same name, whatever its ending."""
    worse = pictures_in(str(Path(settings.own.pictures) / WORSE), NAME, "")
    for folder, paths in ((BETTER, better), (WORSE, worse)):
        twice = [stem for stem, count in Counter(path.stem for path in paths).items() if count > 1]
        if twice:
            raise OneStepError(
                f"{folder} holds two pictures of the name {twice[0][:100]!r}: a pair is two pictures of one name, one "
                "in each folder. Rename or remove one"
            )
    found = {path.stem: path for path in worse}
    for lone, there, absent in (
        (sorted(path.name for path in better if path.stem not in found), BETTER, WORSE),
        (sorted(path.name for path in worse if path.stem not in {one.stem for one in better}), WORSE, BETTER),
    ):
        if lone:
            raise OneStepError(
                f"{len(lone)} of the pictures in {there} have no partner of their name in {absent} ({lone[0][:100]!r} "
                "the first): put it there, or take this one out"
            )
    for path in better:
        if path.read_bytes() == found[path.stem].read_bytes():
            raise OneStepError(
                f"the two pictures of the pair {path.stem[:100]!r} are the same file: neither is better. Put another "
                f"picture into {WORSE}, or take the pair out"
            )
    return [found[path.stem] for path in better]


@dataclass
class PreferencePairs:
    """Latents of both, each in the bucket of the better one, and the captions' conditions."""

    setup: Setup
    _worse: dict[Size, Tensor] = field(default_factory=dict)

    @cached_property
    def better(self) -> CaptionedPictures:
        return CaptionedPictures(replace(self.setup, settings=of_better(self.setup.settings)))

    def draw(self, batch: Batch) -> tuple[Batch, Tensor, Tensor]:
        """(samples like ``batch`` of one bucket under their captions, the better pictures [B, C, h, w], the worse)."""
        size, at = self.better.choose(batch)
        drawn = replace(self.better.under_captions(batch, size, at), sliced=batch.sliced)
        good, bad = self.better.latents_of(size)[at], self._of(size)[at]
        return drawn, sent(good, batch.device), sent(bad, batch.device)

    def prepare(self) -> None:
        """Encode all of it now."""
        self.better.prepare()
        if len(self.better.every) == 1:
            notice("one pair tells what is better of one picture alone: some tens, of different prompts, are usual")
        with processes.first_alone():
            for size in dict.fromkeys(one.size for one in self.better.every):
                self._of(size)

    def _of(self, size: Size) -> Tensor:
        if size not in self._worse:
            path = self.better.folder / f"{WORSE}-{size[0]}x{size[1]}.safetensors"
            if not path.is_file():
                chosen = [self.better.every[row].path for row in self.better.in_bucket(size)]
                # of one folder: its pictures lie beside the better ones'
                write_tensors(path, {"x": encoded(self.setup.host, self._partners(chosen), size, NAME)})
            self._worse[size] = map_tensors(path)["x"]
        return self._worse[size]

    def _partners(self, better: Sequence[Path]) -> list[Path]:
        every = [one.path for one in self.better.every]
        found = dict(zip(every, partners(self.setup.settings, every), strict=True))
        return [found[path] for path in better]
