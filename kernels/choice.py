"""Which implementation serves an op: plain torch, which is always right, or a kernel that proved itself here.

A kernel is used after a small trial in which it agreed with plain torch, and where nobody forces it, was no slower. The
environment variable ONESTEP_KERNELS (auto, reference, triton or cuda; auto when unset) forces the choice: where an op
has no such kernel, or its trial fails, one line says so and plain torch serves.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

REFERENCE = "reference"
CHOICES = ("auto", REFERENCE, "triton", "cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WORKS = "works"

Part = Callable[..., tuple[Tensor, ...]]
Example = Callable[[torch.device, torch.dtype, bool], dict[str, tuple[Any, ...]]]


class NotServedError(Exception):
    """A kernel has no form for these shapes; plain torch serves them, and the kernel stays in use."""


@dataclass(eq=False)
class Op:
    """An op's implementations. Each is a dictionary of parts ("forward", "backward"), the same for all.

    loaders: by name, what imports a kernel; ImportError says why it is not there. example: (device, dtype, large) ->
    each part's arguments, made anew from one seed at each call: small and odd for a trial, large for its speed.
    """

    name: str
    reference: Mapping[str, Part]
    loaders: Mapping[str, Callable[[], Mapping[str, Part]]]
    example: Example
    _states: dict[tuple[str, torch.device, torch.dtype], str] = field(default_factory=dict)
    _speeds: dict[tuple[str, torch.device, torch.dtype], float] = field(default_factory=dict)

    def run(self, part: str, like: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """``part`` of the op by what serves tensors like ``like``; by plain torch where that fails."""
        name = self.choice(like.device, like.dtype)
        if name != REFERENCE:
            try:
                return self.loaders[name]()[part](*args)
            except torch.OutOfMemoryError:  # whoever called can make do with less
                raise
            except NotServedError:
                pass
            except Exception as trouble:  # whatever a kernel does must not end a person's run
                self._states[name, like.device, like.dtype] = why = _sentence(trouble)
                _said.add(self._lacking(name, why))
                _say(f"{self.name} by {name} fails ({why}): plain torch serves from now on")
        return self.reference[part](*args)

    @torch.compiler.assume_constant_result  # a compiler takes the answer; a trial is nothing to trace
    def choice(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the implementation that serves tensors of ``dtype`` on ``device``."""
        wanted = os.environ.get("ONESTEP_KERNELS", "auto").lower()
        if wanted == REFERENCE or dtype not in DTYPES or (wanted == "auto" and device.type != "cuda"):
            return REFERENCE
        if wanted not in CHOICES:
            raise ValueError(f"ONESTEP_KERNELS is {wanted!r:.40}: set it to one of {', '.join(CHOICES)}")
        if wanted == "auto":
            return self._fastest(device, dtype)
        state = self.state(wanted, device, dtype)
        if state != WORKS:
            _say(self._lacking(wanted, state))
            return REFERENCE
        return wanted

    def _lacking(self, wanted: str, state: str) -> str:
        return f"ONESTEP_KERNELS asks for {wanted}, but {self.name} has it not ({state}): plain torch serves"

    def state(self, name: str, device: torch.device, dtype: torch.dtype) -> str:
        """What ``name`` does here: "works", or why it does not."""
        if name == REFERENCE:
            return WORKS
        if name not in self.loaders:
            return "not written"
        key = name, device, dtype
        if key not in self._states:
            self._states[key] = self._tried(name, device, dtype)
        return self._states[key]

    def speed(self, name: str, device: torch.device, dtype: torch.dtype) -> float:
        """How many times as fast as plain torch a working kernel is here, forward and backward of a usual size."""
        key = name, device, dtype
        if key not in self._speeds:
            parts = self.example(device, dtype, True)
            plain, ours = (_seconds(which, parts, device) for which in (self.reference, self.loaders[name]()))
            self._speeds[key] = plain / ours
        return self._speeds[key]

    def _fastest(self, device: torch.device, dtype: torch.dtype) -> str:
        working = [name for name in self.loaders if self.state(name, device, dtype) == WORKS]
        speeds = {name: self.speed(name, device, dtype) for name in working}
        return max(speeds, key=lambda name: speeds[name]) if max(speeds.values(), default=0) >= 1 else REFERENCE

    def _tried(self, name: str, device: torch.device, dtype: torch.dtype) -> str:
        if device.type == "cpu" and not (name == "triton" and interpreted()):
            return "needs a GPU"
        try:
            error = self._error(self.loaders[name](), device, dtype)
        except Exception as trouble:
            return _sentence(trouble)
        return WORKS if error < 0.02 else f"wrong by {error:.2g} in a trial"

    @torch.inference_mode(False)  # the first call may come from a sampler, under inference mode
    @torch.no_grad()
    def _error(self, ours: Mapping[str, Part], device: torch.device, dtype: torch.dtype) -> float:
        """Largest difference from plain torch in any result of any part, relative to the result's largest number."""
        gaps = []
        for part in self.reference:
            found = [which[part](*self.example(device, dtype, False)[part]) for which in (ours, self.reference)]
            gaps += [_gap(mine, right) for mine, right in zip(*found, strict=True)]
        return float(torch.stack(gaps).max())  # NaN where any number is


@lru_cache
def load_triton(module: str) -> Mapping[str, Part]:
    """The parts that a module of this package implements in Triton. ImportError where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError("Triton is not installed")
    return importlib.import_module(f".{module}", __package__).PARTS


@lru_cache
def load_cuda(op: str) -> Mapping[str, Part]:
    """The parts of ``op`` in the library that `python -m onestep.kernels build` made. ImportError where there is
    none."""
    return importlib.import_module(".library", __package__).load(op)


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on a CPU, as TRITON_INTERPRET=1 asks for before it is
    imported."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def _gap(mine: Tensor, right: Tensor) -> Tensor:
    if mine.shape != right.shape or mine.dtype != right.dtype:
        raise ValueError(f"gives {list(mine.shape)} of {mine.dtype}, not {list(right.shape)} of {right.dtype}")
    return (mine.float() - right.float()).abs().max() / right.float().abs().max().clamp_min(1e-6)


@torch.inference_mode(False)
@torch.no_grad()
def _seconds(which: Mapping[str, Part], examples: Mapping[str, tuple[Any, ...]], device: torch.device) -> float:
    """Of one round of all parts: the best of three times ten, after one that compiles."""
    best = float("inf")
    for rounds in (1, 10, 10, 10):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(rounds):
            for part, args in examples.items():
                which[part](*args)
        torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - began) / rounds) if rounds > 1 else best
    return best


def _sentence(trouble: Exception) -> str:
    return (str(trouble).strip().split("\n")[0] or type(trouble).__name__)[:160]


_said: set[str] = set()


def _say(line: str) -> None:
    """One line in the log, once."""
    if line not in _said:
        _said.add(line)
        logging.getLogger(__name__).warning("OneStep: %s", line)
