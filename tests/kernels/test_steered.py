"""Steered attention against softmax and the papers' equations in NumPy's float64, by each implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from onestep.kernels.steered import OP, Steer, steered_attention, steered_attention_reference
from onestep.kernels.steering import nag

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# batch, heads, queries, positive keys, negative keys, width
SHAPES = {"odd": (2, 3, 19, 7, 11, 5), "text": (1, 2, 70, 77, 154, 40), "one": (1, 1, 1, 1, 1, 1)}
STEERS = {
    "nasa": Steer(0.3),
    "nag": Steer(3.0, True, 1.3, 0.5, 1),
    "nag of order 2": Steer(5.0, True, 1.5, 0.25, 2),
    "nag without a limit": Steer(3.0, True, 100.0, 1.0, 1),
}


def case(name: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    batch, heads, queries, keys, others, width = SHAPES[name]
    lengths = queries, keys, keys, others, others
    return [torch.randn(batch, heads, length, width).to(device, dtype) for length in lengths]


def by_hand(q, k, v, k2, v2, steer: Steer) -> np.ndarray:
    """arXiv:2412.02687, Eq. 6; arXiv:2505.21179, Eqs. 7 to 10, with s = phi + 1."""
    q, k, v, k2, v2 = (value.double().cpu().numpy() for value in (q, k, v, k2, v2))
    positive, negative = attention(q, k, v), attention(q, k2, v2)
    if not steer.nag:
        return positive - steer.scale * negative
    extrapolated = steer.scale * positive - (steer.scale - 1) * negative
    norms = [np.abs(z**steer.order).sum((1, 3), keepdims=True) ** (1 / steer.order) for z in (extrapolated, positive)]
    ratio = norms[0] / norms[1]
    return steer.alpha * extrapolated * np.minimum(ratio, steer.tau) / ratio + (1 - steer.alpha) * positive


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), v)


def assert_near(ours: Tensor, right: np.ndarray, tolerance: float) -> None:
    assert np.abs(ours.double().cpu().numpy() - right).max() <= tolerance * np.abs(right).max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("steer", STEERS)
@pytest.mark.parametrize("name", SHAPES)
def test_is_the_papers_equation(name, steer, dtype, implementation, device):
    assert OP.choice(device, dtype) == implementation
    tensors = case(name, dtype, device)
    out = steered_attention(*tensors, STEERS[steer])
    assert out.dtype == dtype
    assert_near(out, by_hand(*tensors, STEERS[steer]), TOLERANCE[dtype])


def test_the_limit_reaches_some_tokens_and_not_others():
    """Or the tests above would not see it."""
    q, k, v, k2, v2 = (value.double().numpy() for value in case("odd", torch.float32, torch.device("cpu")))
    ratio = np.abs(3 * attention(q, k, v) - 2 * attention(q, k2, v2)).sum((1, 3)) / np.abs(attention(q, k, v)).sum(
        (1, 3)
    )
    assert 0.1 < (ratio > 1.3).mean() <= 1 and (ratio > 100).mean() == 0


def test_turned_inputs(implementation, device):
    """As a projection leaves them: [B, N, H, D] seen as [B, H, N, D]; and a width that is strided."""
    tensors = case("odd", torch.float32, device)
    turned = [value.transpose(1, 2).contiguous().transpose(1, 2) for value in tensors]
    strided = [value.mT.contiguous().mT for value in tensors]
    right = by_hand(*tensors, STEERS["nag"])
    for given in (turned, strided):
        assert_near(steered_attention(*given, STEERS["nag"]), right, 3e-6)


@pytest.mark.parametrize("steer", ["nasa", "nag"])
def test_gradients_are_plain_torchs(steer, implementation, device):
    tensors = [value.requires_grad_(True) for value in case("odd", torch.float32, device)]
    for function in (steered_attention, torch.ops.onestep.steered_attention):
        arguments = (STEERS[steer],) if function is steered_attention else STEERS[steer]
        ours = torch.autograd.grad(function(*tensors, *arguments).square().sum(), tensors)
        right = torch.autograd.grad(steered_attention_reference(*tensors, STEERS[steer]).square().sum(), tensors)
        for mine, other in zip(ours, right, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_forward_mode_has_the_tangent(implementation):
    values, moves = (case("odd", torch.float32, torch.device("cpu")) for _ in range(2))
    _, tangent = torch.func.jvp(lambda *v: steered_attention(*v, STEERS["nag"]), tuple(values), tuple(moves))
    h = 1e-6
    ends = [[v.double() + side * h * m.double() for v, m in zip(values, moves, strict=True)] for side in (1, -1)]
    slope = (by_hand(*ends[0], STEERS["nag"]) - by_hand(*ends[1], STEERS["nag"])) / (2 * h)
    assert_near(tangent, slope, 1e-4)


def test_what_no_kernel_takes_is_plain_torchs(implementation, device):
    """No queries, keys in another dtype, a text of one head for all, float64."""
    q, k, v, k2, v2 = case("odd", torch.float32, device)
    steer = STEERS["nasa"]
    assert steered_attention(q[:, :, :0], k, v, k2, v2, steer).shape == (2, 3, 0, 5)
    spread = [value[:, :1].expand(-1, 3, -1, -1) for value in (k, v, k2, v2)]
    assert_near(steered_attention(q, *spread, steer), by_hand(q, *spread, steer), 3e-6)
    wide = [value.double() for value in (q, k, v, k2, v2)]
    assert_near(steered_attention(*wide, steer), by_hand(*wide, steer), 1e-12)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert_near(steered_attention(q, k, v, k2, v2, steer), by_hand(q, k, v, k2, v2, steer), 2e-2)


def test_a_positive_of_nothing_stays_finite(implementation, device):
    q, k, v, k2, v2 = case("odd", torch.float32, device)
    out = steered_attention(q, k, 0 * v, k2, 0 * v2, STEERS["nag"])
    assert torch.equal(out, nag(0 * q, 0 * q, 3.0, 1.3, 0.5)) and out.isfinite().all()


def test_torch_knows_the_op(implementation):
    tensors = case("odd", torch.float32, torch.device("cpu"))
    torch.library.opcheck(torch.ops.onestep.steered_attention.default, (*tensors, *STEERS["nag"]))
    tensors = [value.requires_grad_(True) for value in tensors]
    torch.library.opcheck(torch.ops.onestep.steered_attention.default, (*tensors, *STEERS["nasa"]))
