"""What each op's implementations cost at the sizes of SDXL's and SD1.5's layers, forward and backward, beside the form
that is written out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from part import Run, Table, milliseconds, peak_bytes
from torch import Tensor

from onestep.kernels import LoRA, Place, add_lora, add_lora_reference, gated, gated_reference, rotary
from onestep.kernels.choice import REFERENCE, WORKS
from onestep.kernels.ops import OPS
from onestep.kernels.steered import Steer, steered_attention
from onestep.kernels.steering import nag

WRITTEN_OUT = "written out"
Case = tuple[str, Callable[[], Any], Callable[[], Any]]
"""What is measured, by the op, and written out."""


def measure(run: Run) -> Table:
    dtype = torch.float32 if run.device.type == "cpu" else torch.bfloat16
    rows = []
    for op, cases in zip(OPS, (make(run, dtype) for make in CASES), strict=True):
        working = [name for name in op.loaders if op.state(name, run.device, dtype) == WORKS]
        for title, ours, plain in cases:
            rows.append(row(run, op.name, title, WRITTEN_OUT, plain))
            for name in (REFERENCE, *working):
                with forced(name):
                    rows.append(row(run, op.name, title, name, ours))
    return Table(("op", "case", "by", "ms", "peak MiB"), rows)


def row(run: Run, op: str, title: str, name: str, function: Callable[[], Any]) -> tuple[Any, ...]:
    return op, title, name, milliseconds(run, function), peak_bytes(run.device, function) / 2**20


@contextmanager
def forced(name: str) -> Iterator[None]:
    before = os.environ.get("ONESTEP_KERNELS")
    os.environ["ONESTEP_KERNELS"] = name
    try:
        yield
    finally:
        os.environ.pop("ONESTEP_KERNELS") if before is None else os.environ.update(ONESTEP_KERNELS=before)


def drawn(run: Run, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=run.device).to(dtype)


def lora_cases(run: Run, dtype: torch.dtype) -> Iterator[Case]:
    """A frozen layer with adapters of rank 64: a student's rows, and a critic's beside a teacher's."""
    sizes = [(16, 8, 8)] if run.tiny else [(4096, 640, 640), (1024, 1280, 1280), (1024, 1280, 10240)]
    for tokens, width, wide in sizes:
        for batch, rows, who in ((1, slice(None), "student"), (4, slice(None), "student"), (3, slice(2, 3), "critic")):
            weight, x = drawn(run, dtype, wide, width) / width**0.5, drawn(run, dtype, batch, tokens, width)
            a, b = (
                torch.randn(s, device=run.device).mul_(0.05).requires_grad_(True) for s in ((64, width), (wide, 64))
            )
            x.requires_grad_(True)

            def passed(function: Any, x=x, weight=weight, a=a, b=b, rows=rows) -> None:
                out = function(F.linear(x, weight), x, [LoRA(a, b, Place(rows))])
                torch.autograd.grad(out, (x, a, b), out.detach())

            title = f"{batch} x {tokens} tokens, {width} to {wide}, {who}'s rows"
            yield title, lambda passed=passed: passed(add_lora), lambda passed=passed: passed(add_lora_reference)


def gate_cases(run: Run, dtype: torch.dtype) -> Iterator[Case]:
    for rows, width in [(16, 8)] if run.tiny else [(4096, 2560), (1024, 5120), (4096, 5120)]:
        projected = drawn(run, dtype, rows, 2 * width).requires_grad_(True)

        def passed(function: Any, projected=projected) -> None:
            out = function(projected)
            torch.autograd.grad(out, projected, out.detach())

        title = f"{rows} tokens, {width} wide"
        yield title, lambda passed=passed: passed(gated), lambda passed=passed: passed(gated_reference)


def rotary_cases(run: Run, dtype: torch.dtype) -> Iterator[Case]:
    """Queries of Flux, with a gradient."""
    for length, heads, width in [(8, 2, 8)] if run.tiny else [(1536, 24, 128), (4608, 24, 128)]:
        x, weight = drawn(run, dtype, 1, length, heads, width).requires_grad_(True), drawn(run, dtype, width)
        angle = torch.randn(length, width // 2, device=run.device).repeat_interleave(2, 1)
        rest = weight, angle.cos(), angle.sin(), 1e-6

        def passed(function: Any, x=x, rest=rest) -> None:
            out = function(x, *rest)
            torch.autograd.grad(out, x, out.detach())

        title = f"{length} tokens, {heads} heads of {width}"
        plain = rotary.normed_rotary_reference
        yield (
            title,
            lambda passed=passed: passed(rotary.normed_rotary),
            lambda passed=passed, plain=plain: passed(plain),
        )


def steer_cases(run: Run, dtype: torch.dtype) -> Iterator[Case]:
    """NAG with a negative as long as the prompt, forward alone; written out by two SDPA."""
    steer = Steer(3.0, True, 2.5, 0.5)
    for heads, tokens, width in [(2, 16, 8)] if run.tiny else [(10, 4096, 64), (20, 1024, 64), (8, 4096, 40)]:
        given = [drawn(run, dtype, 1, heads, length, width) for length in (tokens, 77, 77, 77, 77)]

        def plain(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
            found = F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k2, v2)
            return nag(*found, steer.scale, steer.tau, steer.alpha)

        title = f"{tokens} tokens, {heads} heads of {width}"
        yield title, lambda given=given: steered_attention(*given, steer), lambda given=given: plain(*given)


CASES = lora_cases, gate_cases, rotary_cases, steer_cases
"""In the order of `OPS`."""
