"""bitsandbytes' AdamW of 8 bits, without a first moment as long as its decay is 0."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

BLOCKS = (256, 2048)
"""Numbers that share a scale, in bitsandbytes of today and of before 0.45."""


def eight_bit() -> Any:
    """AdamW8bit where bitsandbytes can be imported, else None.

    m_n = b m_(n-1) + (1 - b) g_n is g_n itself where b = 0: its kernel writes that all the same, into a buffer that is
    lent to it, tensor by tensor, and not kept.
    """
    try:
        package = importlib.import_module("bitsandbytes")
        return _without_first_moment(package.optim.AdamW8bit, package.functional.quantize_blockwise)
    except Exception:  # a broken build of bitsandbytes raises anything from ImportError to OSError
        return None


def _without_first_moment(whole: Any, quantize: Any) -> Any:
    class AdamW8bit(whole):  # type: ignore[misc]
        def init_state(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
            super().init_state(group, p, gindex, pindex)
            _keep(self.state[p], group["betas"][0])

        def update_step(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
            if "state1" not in self.state[p]:
                _lend(self.state[p], p, group["betas"][0], quantize)
            super().update_step(group, p, gindex, pindex)
            _keep(self.state[p], group["betas"][0])

    return AdamW8bit


def _keep(state: dict[str, Any], beta: float) -> None:
    """What the next step reads."""
    if beta == 0:
        state.pop("state1")
        state.pop("absmax1", None)


@torch.no_grad()
def _lend(state: dict[str, Any], p: Tensor, beta: float, quantize: Any) -> None:
    """A first moment of before. Where beta is above 0 again, m begins anew as at the first step, from
    m_(n-1) = (1 - beta^(n-1)) g_n, so that m_n = (1 - beta^n) g_n."""
    assert p.grad is not None
    state["state1"] = torch.zeros_like(state["state2"])
    before = p.grad * (1 - beta ** state["step"])
    if "absmax2" not in state:  # too few numbers for 8 bits
        state["state1"].copy_(before)
        return
    state["absmax1"] = torch.zeros_like(state["absmax2"])
    if beta and state["step"]:
        size = next(size for size in BLOCKS if len(state["absmax1"]) == -(-p.numel() // size))
        told = {"absmax": state["absmax1"], "out": state["state1"], "blocksize": size}
        quantize(before.contiguous(), code=state["qmap1"], **told)
