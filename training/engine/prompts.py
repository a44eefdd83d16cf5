"""The prompts of a run: checked, embedded once, cached on disk, and drawn from for each batch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ...core import randomness
from ...core.cond import Cond
from ...core.errors import OneStepError
from ...core.lengths import cut
from ...core.memory import Slices
from ...core.tensor_file import map_tensors, write_tensors
from ..host import Host
from ..settings import Settings
from .batch import Batch

LONGEST = 4000
MOST_BYTES = 64 * 2**20
MOST = 100_000
AT_ONCE = 16
"""Prompts that a host is given to encode at once."""
Size = tuple[int, int]
Tick = Callable[[str, int, int], None]
"""(what is being done, in words; how much of it is done; how much it is): called as long work goes on."""


def silent(phase: str, done: int, of: int) -> None:
    """A `Tick` that tells nobody."""


def lines(text: str) -> list[str]:
    """The prompts of a text, one a line, stripped; empty lines are none.

    A line ends where an editor ends it, at LF, CR LF or CR. str.splitlines also ends it inside a pasted prompt, at
    U+2028, U+0085, a vertical tab, a form feed and the like: these are blanks here.
    """
    return [line.strip() for line in re.split(r"\r\n|\n|\r", text) if line.strip()]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file. Raises OneStepError for a file that cannot be read, is no text, or holds none."""
    name = path.name[:100]
    try:
        if path.stat().st_size > MOST_BYTES:
            raise OneStepError(f"{name} has {path.stat().st_size >> 20} MiB: a prompt list has one prompt a line")
        prompts = lines(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OneStepError(
            f"the prompts {str(path)[-150:]!r} cannot be read: {error.strerror}. Check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise OneStepError(
            f"{name} is no UTF-8 text (byte {error.start}): save it as UTF-8, one prompt a line"
        ) from None
    if not prompts:
        raise OneStepError(f"{name} holds no prompt: write one a line; 200 to 1000 that you would really use do well")
    return check_prompts(prompts)


def check_prompts(prompts: Iterable[Any]) -> list[str]:
    """The prompts, stripped. Raises OneStepError for none, too many, an empty or an overlong one, and for what is no
    text."""
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise OneStepError(f"prompts is {prompts!r:.60}, not a list: give a list of texts, one for each prompt")
    cleaned = [_text(prompt, number).strip() for number, prompt in enumerate(prompts, 1)]
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


def _text(prompt: Any, number: int) -> str:
    if not isinstance(prompt, str):
        raise OneStepError(f"prompt {number} is {prompt!r:.60}, a {type(prompt).__name__}: give a text")
    broken = re.search("[\ud800-\udfff]", prompt)
    if broken:
        raise OneStepError(
            f"prompt {number} holds the half character {broken[0]!r}, which no file can keep: {prompt[:40]!r}... "
            "Save its source as UTF-8"
        )
    return prompt


@dataclass(frozen=True)
class Replaced:
    """Of some prompts, others that the teacher is asked in their place. by: these others. at: [N] of each of the run's
    prompts, which of them; -1 where the prompt stays."""

    by: Prompts
    at: torch.Tensor

    def of(self, size: Size, rows: torch.Tensor, prompts: Prompts) -> Cond | None:
        """What the teacher is asked of the prompts at ``rows``; None where all stay."""
        found = self.at[rows]
        if not bool((found >= 0).any()):
            return None
        # row by row: what is mapped from a file is read where it is asked for
        parts = [
            self.by.conds[size][at : at + 1] if at >= 0 else prompts.conds[size][row : row + 1]
            for at, row in zip(found.tolist(), rows.tolist(), strict=True)
        ]
        return cut(Cond.concat(parts)).sent(prompts.device, torch.float32)


@dataclass(frozen=True)
class Prompts:
    """Conditions of every prompt, and the null condition, for each size, which share what no size changes; on the CPU,
    in the encoders' own dtype. A batch has them in float32. texts: of the prompts. drawn: which of them a batch draws
    from, some more often than others; None = all alike. replaced: what the teacher is asked in the place of some.
    groups: rows of the prompts that a batch is all of one of, each in its turn, for ``turns`` batches in a row."""

    conds: dict[Size, Cond]
    nulls: dict[Size, Cond | None]
    shapes: dict[Size, tuple[int, ...]]
    seed: int
    device: torch.device
    texts: tuple[str, ...] = ()
    drawn: torch.Tensor | None = None
    replaced: Replaced | None = None
    groups: tuple[torch.Tensor, ...] = ()
    turns: int = 1

    def __len__(self) -> int:
        return len(next(iter(self.conds.values())))

    @property
    def sizes(self) -> list[Size]:
        return list(self.conds)

    def batch(self, key: int, samples: Sequence[int]) -> Batch:
        """Samples ``samples`` of the batch ``key``: one size for the whole batch, a prompt drawn for each sample."""
        size = self.sizes[int(randomness.integers(len(self.sizes), self.seed, "size", key, [0])[0])]
        drawn = self.groups[key // self.turns % len(self.groups)] if self.groups else self.drawn
        rows = randomness.integers(len(self) if drawn is None else len(drawn), self.seed, "prompt", key, samples)
        return self.of(size, rows if drawn is None else drawn[rows], key, samples)

    def of(self, size: Size, rows: torch.Tensor, key: int, samples: Sequence[int]) -> Batch:
        """The batch of the prompts at ``rows``, at ``size``: its texts are as long as the longest of them, not as the
        longest of the run."""
        null = self.nulls[size]
        null = None if null is None else cut(null).sent(self.device, torch.float32)
        cond = cut(self.conds[size][rows]).sent(self.device, torch.float32)
        teachers = None if self.replaced is None else self.replaced.of(size, rows, self)
        texts = tuple(self.texts[row] for row in rows.tolist()) if self.texts else ()
        shape = self.shapes[size]
        return Batch(cond, null, self.seed, key, samples, shape, self.device, teachers=teachers, texts=texts)


def embed(
    host: Host,
    prompts: Sequence[str],
    settings: Settings,
    folder: Path,
    *,
    guidance_input: bool = False,
    tick: Tick = silent,
) -> Prompts:
    """Embed ``prompts`` and the negative text at every size, or read what an earlier run of the same ones left in
    ``folder``. guidance_input: whether the student is given guidance as a condition (an adapter with a dial)."""
    sizes = settings.size_list
    shapes = {size: host.latent_shape(size) for size in sizes}
    embedded = guidance_input or host.denoiser.guidance == "embedded"
    found = _cached(host, prompts, settings.negative, folder, tick)
    every = {size: _with_guidance(host.with_sizes(found, size), settings, embedded) for size in sizes}
    trained_null = host.denoiser.guidance == "cfg"
    nulls = {size: cond[len(prompts) :] if trained_null else None for size, cond in every.items()}
    conds = {size: cond[: len(prompts)] for size, cond in every.items()}
    return Prompts(conds, nulls, shapes, settings.seed, host.device, tuple(prompts))


def _with_guidance(cond: Cond, settings: Settings, embedded: bool) -> Cond:
    """A base with embedded guidance gets one value for teacher, critic and student; a guidance adapter, which the
    teacher lacks, gets the teacher's."""
    return cond.with_(guidance=torch.full((len(cond),), settings.guidance)) if embedded else cond


def _cached(host: Host, prompts: Sequence[str], negative: str, folder: Path, tick: Tick) -> Cond:
    """What no size changes, the negative last, mapped from its file: the parts of a long list are read as a batch asks
    for them."""
    key = hashlib.sha256("\0".join([host.encoder_hash, *prompts, negative]).encode()).hexdigest()[:32]
    path = folder / f"{key}.safetensors"
    if not path.is_file():
        cond = _encoded(host, prompts, negative, tick)
        values = {entry.name: getattr(cond, entry.name) for entry in fields(cond)}
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {name: value for name, value in values.items() if value is not None})
    return Cond(**map_tensors(path))


def _encoded(host: Host, prompts: Sequence[str], negative: str, tick: Tick) -> Cond:
    """In parts, so that a person sees it go on and may cancel it."""
    whole = len(prompts) + 1

    def encoded(rows: list[int]) -> Cond:
        host.poll()
        tick("encoding prompts", rows[0], whole)
        return host.texts([prompts[row] for row in rows])

    with host.encoding():
        parts = Slices(AT_ONCE, "the texts")(range(len(prompts)), encoded)
        parts += Slices(1, "the texts")([0], lambda _: host.texts([negative], negative=True))
    tick("encoding prompts", whole, whole)
    return Cond.concat(parts)
