"""Each op's implementations against plain torch in float64, in each dtype, at odd and at usual sizes."""

from __future__ import annotations

from typing import Any

import torch
from part import Run, Table

from onestep.kernels.choice import REFERENCE, WORKS, Op
from onestep.kernels.ops import OPS

LIMIT = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of a result's largest number. A result of several thousand terms is rounded once at its end, and A x between."""


def measure(run: Run) -> Table:
    rows, good = [], True
    for op in OPS:
        for name in (REFERENCE, *op.loaders):
            for dtype in LIMIT:
                state = op.state(name, run.device, dtype)
                errors = found(op, name, run, dtype) if state == WORKS else {}
                right = all(error <= LIMIT[dtype] for error in errors.values())
                good &= right and not state.startswith("wrong")
                cells = [errors.get(size, float("nan")) for size in ("odd", "usual")]
                rows.append((op.name, name, str(dtype)[6:], *cells, state if right else "WRONG"))
    return Table(("op", "by", "dtype", "error at odd sizes", "error at usual sizes", "state"), rows, good)


def found(op: Op, name: str, run: Run, dtype: torch.dtype) -> dict[str, float]:
    """Largest error of any part's results, relative to the result's largest number."""
    parts = op.reference if name == REFERENCE else op.loaders[name]()
    sizes = {"odd": False} if run.tiny else {"odd": False, "usual": True}
    return {size: max(_error(op, parts, part, run, dtype, large) for part in parts) for size, large in sizes.items()}


@torch.no_grad()
def _error(op: Op, parts: Any, part: str, run: Run, dtype: torch.dtype, large: bool) -> float:
    ours = parts[part](*op.example(run.device, dtype, large)[part])
    right = op.reference[part](*(_double(value) for value in op.example(run.device, dtype, large)[part]))
    gaps = [(mine.double() - exact).abs().max() / exact.abs().max() for mine, exact in zip(ours, right, strict=True)]
    return float(torch.stack(gaps).max())


def _double(value: Any) -> Any:
    """Tensors, and lists of them, in float64."""
    if isinstance(value, torch.Tensor):
        return value.double()
    return [_double(entry) for entry in value] if isinstance(value, list) else value
