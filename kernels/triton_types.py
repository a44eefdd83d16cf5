"""What Triton calls torch's dtypes. Imported by kernels alone, which need Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on a CPU, as TRITON_INTERPRET=1 asks for before they are imported."""


def operands(dtype: torch.dtype) -> Any:
    """What a kernel multiplies tensors of ``dtype`` in: the interpreter holds bfloat16 as whole numbers, and multiplies
    those."""
    return tl.float32 if INTERPRETED else TYPES[dtype]
