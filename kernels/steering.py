"""How NASA (arXiv:2412.02687) and NAG (arXiv:2505.21179) mix what queries find in a positive and a negative text."""

from __future__ import annotations

import torch
from torch import Tensor


def nasa(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Z = Z+ - a Z-"""
    return torch.add(positive, negative, alpha=-scale)


def nag(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float, order: float = 1) -> Tensor:
    """Z+, Z-: [B, H, N, D]; scale >= 1, the paper's phi + 1. A norm is that of a token over all its heads, of order 1
    (the paper, ComfyUI) or 2 (the authors' code for Flux)."""
    # Z~ = s Z+ - (s - 1) Z- = s G: of G, no scale makes numbers too large for half precision
    return limited(positive, nasa(positive, negative, (scale - 1) / scale), scale, tau, alpha, order)


def limited(positive: Tensor, g: Tensor, scale: float, tau: float, alpha: float, order: float) -> Tensor:
    """NAG's limit of Z~ = s G, and its blend."""
    # Z^ = min(r, tau) / r Z~ = min(s, tau |Z+| / |G|) G,   r = |Z~| / |Z+|
    reach = (tau * _norm(positive, order) / _norm(g, order)).clamp_max(scale)
    # Z = alpha Z^ + (1 - alpha) Z+
    return torch.lerp(positive, g * reach.to(g.dtype), alpha)


def _norm(z: Tensor, order: float) -> Tensor:
    """[B, 1, N, 1], float32 at least and never 0: a token's norm over its heads and their width."""
    wide = torch.promote_types(z.dtype, torch.float32)
    norm = torch.linalg.vector_norm(z, order, dim=(1, 3), keepdim=True, dtype=wide)
    return norm.clamp_min(torch.finfo(wide).tiny)
