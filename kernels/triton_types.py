"""What Triton calls torch's dtypes. Imported by kernels alone, which need Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from .choice import interpreted

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

INTERPRETED = interpreted()


def operands(dtype: torch.dtype) -> Any:
    """What a kernel multiplies tensors of ``dtype`` in: the interpreter holds bfloat16 as whole numbers, and multiplies
    those."""
    return tl.float32 if INTERPRETED else TYPES[dtype]
