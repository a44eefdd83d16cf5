"""The kernels in CUDA C++, where `python -m onestep.kernels build` has built them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .choice import NotServedError
from .steered import Steer

LIBRARY = Path(__file__).parent / "build" / f"onestep_kernels.{'dll' if os.name == 'nt' else 'so'}"


def load(op: str) -> Mapping[str, Callable[..., tuple[Tensor, ...]]]:
    """The parts of ``op``. ImportError where nothing is built."""
    _load_once()
    return {"steered_attention": {"forward": _steered}}[op]


@lru_cache
def _load_once() -> None:
    if not LIBRARY.is_file():
        raise ImportError("not built: `python -m onestep.kernels build` builds it")
    torch.ops.load_library(str(LIBRARY))


def _steered(q: Tensor, k: Tensor, v: Tensor, negative_k: Tensor, negative_v: Tensor, steer: Steer) -> tuple[Tensor]:
    """As in steered.py."""
    tensors = q, k, v, negative_k, negative_v
    room = 2 * q.shape[1] * q.shape[3] + 4 * (q.shape[3] + max(k.shape[2], negative_k.shape[2])) + 8
    if any(value.stride(3) != 1 for value in tensors) or steer.order not in (1, 2) or 4 * room > 48 * 1024:
        raise NotServedError("strided rows, another norm, or more heads or keys than a block of threads has room for")
    stream = torch.cuda.current_stream(q.device).cuda_stream
    scale, nag, tau, alpha, order = steer
    with torch.cuda.device(q.device):
        return (torch.ops.onestep_cuda.steered_attention(*tensors, scale, nag, tau, alpha, order == 2, stream),)
