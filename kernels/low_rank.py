r"""The low-rank product of an adapter, added to its layer's output in one pass.

    y = W x  ->  y + B (A x)        (LoRA, arXiv:2106.09685, Eq. 3, alpha = r)

A written-out adapter reads and writes the output three times (product, scale, sum); here the sum rides in the product
(GEMM with beta = 1) or is written over it. No input is written to, and autograd, forward-mode AD and checkpointing see
ordinary operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Size = int | Sequence[int]


def low_rank_linear(base_out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """base_out + B (A x) over the last axis.

    base_out: [..., out], any strides. x: [..., in]. a: [r, in], b: [out, r], float32 masters or any other dtype:
    they are cast to x's dtype, once each. Returns a new tensor [..., out] in base_out's dtype.
    """
    hidden, up = F.linear(x, a.to(x.dtype)), b.to(x.dtype)
    if hidden.dtype != base_out.dtype:
        return base_out + F.linear(hidden, up).to(base_out.dtype)
    rows = torch.addmm(base_out.reshape(-1, len(up)), hidden.reshape(-1, up.shape[1]), up.t())
    return rows.view(base_out.shape)


def low_rank_linear_reference(base_out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What `low_rank_linear` computes, written out."""
    hidden = torch.einsum("...i,ri->...r", x, a.to(x.dtype))
    return base_out + torch.einsum("...r,or->...o", hidden, b.to(x.dtype)).to(base_out.dtype)


def low_rank_conv(
    base_out: Tensor, x: Tensor, a: Tensor, b: Tensor, stride: Size = 1, padding: Size | str = 0, dilation: Size = 1
) -> Tensor:
    """base_out + B (A * x): A convolves as the layer does, B mixes its channels.

    base_out: [N, out, H', W'], any strides. x: [N, in, H, W]. a: [r, in, kh, kw], b: [out, r, 1, 1], cast to x's dtype.
    stride, padding, dilation: the layer's own. Returns a new tensor of base_out's shape and dtype, in x's layout.
    """
    hidden = F.conv2d(x, a.to(x.dtype), None, stride, padding, dilation)
    # The sum is written over the product, which is nobody's yet and which no derivative needs.
    return F.conv2d(hidden, b.to(x.dtype)).to(base_out.dtype).add_(base_out)


def low_rank_conv_reference(
    base_out: Tensor, x: Tensor, a: Tensor, b: Tensor, stride: Size = 1, padding: Size | str = 0, dilation: Size = 1
) -> Tensor:
    """What `low_rank_conv` computes, written out."""
    hidden = F.conv2d(x, a.to(x.dtype), None, stride, padding, dilation)
    return base_out + F.conv2d(hidden, b.to(x.dtype)).to(base_out.dtype)
