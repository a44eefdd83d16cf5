"""The prompts of a run: checked, embedded once, cached on disk, and drawn from for each batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from ...core import randomness
from ...core.cond import Cond
from ...core.errors import OneStepError
from ...core.tensor_file import read_tensors, write_tensors
from ..host import Host
from ..settings import Settings
from .batch import Batch

LONGEST = 4000
MOST = 100_000
Size = tuple[int, int]


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts, stripped. Raises OneStepError for none, too many, an empty or an overlong one."""
    cleaned = [prompt.strip() for prompt in prompts]
    if not 1 <= len(cleaned) <= MOST:
        raise OneStepError(
            f"{len(cleaned)} prompts: give 1 to {MOST}, one a line; 200 to 1000 that you would really use do well"
        )
    for number, prompt in enumerate(cleaned, 1):
        if not prompt:
            raise OneStepError(f"prompt {number} is empty: remove the line, or write what to draw")
        if len(prompt) > LONGEST:
            raise OneStepError(
                f"prompt {number} has {len(prompt)} characters, more than {LONGEST}: {prompt[:40]!r}... Shorten it"
            )
    return cleaned


@dataclass(frozen=True)
class Prompts:
    """Conditions of every prompt, and the null condition, for each size; on the CPU. texts: of the prompts."""

    conds: dict[Size, Cond]
    nulls: dict[Size, Cond | None]
    shapes: dict[Size, tuple[int, ...]]
    seed: int
    device: torch.device
    texts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.conds.values())))

    @property
    def sizes(self) -> list[Size]:
        return list(self.conds)

    def batch(self, key: int, samples: Sequence[int]) -> Batch:
        """Samples ``samples`` of the batch ``key``: one size for the whole batch, a prompt drawn for each sample."""
        size = self.sizes[int(randomness.integers(len(self.sizes), self.seed, "size", key, [0])[0])]
        return self.of(size, randomness.integers(len(self), self.seed, "prompt", key, samples), key, samples)

    def of(self, size: Size, rows: torch.Tensor, key: int, samples: Sequence[int]) -> Batch:
        """The batch of the prompts at ``rows``, at ``size``."""
        null = self.nulls[size]
        null = None if null is None else null.to(self.device)
        cond = self.conds[size][rows].to(self.device)
        return Batch(cond, null, self.seed, key, samples, self.shapes[size], self.device)


def embed(host: Host, prompts: Sequence[str], settings: Settings, folder: Path) -> Prompts:
    """Embed ``prompts`` and the negative text at every size, or read what an earlier run of the same ones left in
    ``folder``."""
    sizes = settings.size_list
    shapes = {size: host.latent_shape(size) for size in sizes}
    texts = [*prompts, settings.negative]
    every = {size: _told(_cached(host, texts, size, folder), host, settings) for size in sizes}
    trained_null = host.denoiser.guidance == "cfg"
    nulls = {size: cond[len(prompts) :] if trained_null else None for size, cond in every.items()}
    conds = {size: cond[: len(prompts)] for size, cond in every.items()}
    return Prompts(conds, nulls, shapes, settings.seed, host.device, tuple(prompts))


def _told(cond: Cond, host: Host, settings: Settings) -> Cond:
    """A base with embedded guidance tells teacher, critic and student the same value; a guidance adapter, which the
    teacher lacks, is told the teacher's."""
    if host.denoiser.guidance != "embedded" and settings.method != "agd":
        return cond
    return cond.with_(guidance=torch.full((len(cond),), settings.guidance))


def _cached(host: Host, texts: Sequence[str], size: Size, folder: Path) -> Cond:
    key = hashlib.sha256("\0".join([host.encoder_hash, f"{size}", *texts]).encode()).hexdigest()[:32]
    path = folder / f"{key}.safetensors"
    if not path.is_file():
        cond = host.encode(texts, size)
        values = {entry.name: getattr(cond, entry.name) for entry in fields(cond)}
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {name: value for name, value in values.items() if value is not None})
    tensors = read_tensors(path)
    mask = tensors.pop("mask", None)
    return Cond(**tensors, mask=None if mask is None else mask.bool())
