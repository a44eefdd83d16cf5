"""What a rehearsal has that a run has not: a batch and a rank that are primes and divide nothing else in it
(training.plan.trace), and the middle one of whatever a run draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from math import prod
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from ..engine.batch import Batch
from ..engine.prompts import Prompts, Size
from ..host import Host
from ..settings import Settings

BATCHES = (13, 17, 19, 23, 29, 31, 37, 41, 43, 47)
RANKS = (61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109)
PROMPT = "a, b, c, d"
"""Of several parts, as a run of negatives wants them."""


def sizes_of(host: Host, settings: Settings) -> set[int]:
    """Of which a number of bytes may be a product that grows with neither the batch nor the rank: sizes of the weights,
    bytes of the text encoders, latents and tokens, one after the other and in one row, and what the method's settings
    name."""
    sizes = {size for weight in tensors_of(host.network) for size in weight.shape} | {getattr(host, "encoders", 0)}
    for size in settings.size_list:
        channels, height, width = host.latent_shape(size)
        tokens = host.encode([PROMPT], size).text.shape[1]
        rows = {part * height * width // 4 + more for part in (1, 4) for more in (0, tokens)}
        sizes |= {channels, height, width, tokens, *size, *rows}
    # of all factors of a role, which are cast into one row
    sizes.add(sum(prod(target.shape_a(1)) + prod(target.shape_b(1)) for target in host.denoiser.roles.targets.values()))
    return (sizes | {value for value in asdict(settings.own).values() if type(value) is int}) - {0}


def prime(primes: Sequence[int], sizes: set[int]) -> int:
    """The first that divides none of ``sizes``."""
    return next(prime for prime in primes if all(size % prime for size in sizes))


def without_donor(settings: Settings) -> Settings:
    """A critic that begins as the donor is as large as one that begins as the base: it needs none to be counted; and a
    head that looks at a person's pictures no more than one that looks at the teacher's."""
    told = settings.flat()
    donor = told.get("critic_start") == "donor" and not settings.initial_lora
    changes = {"critic_start": "base"} if donor else {}
    return settings.with_(**changes, **({"real_pictures": ""} if told.get("real_pictures") else {}))


def with_a_picture(settings: Settings, folder: Path) -> Settings:
    """Of a method that learns of a person's pictures, one of nothing: how many there are costs no update anything."""
    own = settings.own
    if not (getattr(own, "pictures", "") or getattr(own, "needs_pictures", False)):
        return settings
    for shade, place in enumerate(getattr(own, "picture_folders", ("",))):
        (folder / place).mkdir(parents=True)
        Image.new("RGB", settings.size_list[0], (shade, shade, shade)).save(folder / place / "picture.png")
    return settings.with_(pictures=str(folder), caption=PROMPT)


def tensors_of(network: nn.Module) -> list[Tensor]:
    """Weights and buffers."""
    return [*network.parameters(), *network.buffers()]


class MiddleBatch(Batch):
    """Of 1, 2, 3, 4 ... steps the 1st, 2nd, 2nd, 3rd ...: where there are several, one is before it, so that each kind
    of work is done whatever a run would draw."""

    def choice(self, high: int, stream: str) -> int:
        return high // 2


class MiddlePrompts(Prompts):
    def of(self, size: Size, rows: Tensor, key: int, samples: Sequence[int]) -> Batch:
        return MiddleBatch(**_values(super().of(size, rows, key, samples)))


def undrawn(prompts: Prompts) -> Prompts:
    """The same, whose batches draw nothing: their choice is the middle one."""
    return MiddlePrompts(**_values(prompts))


def _values(of: Batch | Prompts) -> dict[str, Any]:
    return {entry.name: getattr(of, entry.name) for entry in fields(of)}
