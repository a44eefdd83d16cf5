"""Attention against softmax written out in NumPy, against finite differences, and in forward mode."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from torch import Tensor

from onestep.kernels import attention, attention_reference, attention_with_lse, backends

SHAPES = [(1, 1, 1, 1, 8), (2, 3, 5, 7, 16), (1, 2, 33, 77, 40), (2, 1, 9, 3, 3)]


def case(batch: int, heads: int, queries: int, keys: int, width: int, dtype=torch.float64) -> list[Tensor]:
    shapes = [(batch, heads, length, width) for length in (queries, keys, keys)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> np.ndarray:
    """softmax(q k^T / sqrt(D)) v (arXiv:1706.03762, Eq. 1)."""
    q, k, v = (value.detach().double().numpy() for value in (q, k, v))
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask.numpy(), scores, -np.inf) if mask.dtype == torch.bool else scores + mask.numpy()
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), v)


def masks(queries: int, keys: int) -> dict[str, Tensor | None]:
    """No key but the first is looked at by every query, so that no row is empty."""
    look = torch.rand(1, 1, queries, keys) < 0.6
    look[..., 0] = True
    return {"none": None, "bool": look, "keys": look[0, 0, 0], "bias": torch.randn(queries, keys)}


@pytest.mark.parametrize("name", ["sdpa", "reference", "auto"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_equation(name, shape, monkeypatch):
    monkeypatch.setenv("ONESTEP_ATTENTION", name)
    q, k, v = case(*shape)
    for mask in masks(shape[2], shape[3]).values():
        expected = torch.from_numpy(by_hand(q, k, v, mask))
        torch.testing.assert_close(attention(q, k, v, mask), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_gradients_match_finite_differences(name, monkeypatch):
    monkeypatch.setenv("ONESTEP_ATTENTION", name)
    inputs = [value.requires_grad_(True) for value in case(1, 2, 3, 5, 4)]
    mask = torch.tensor([True, True, False, True, True])
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, mask), inputs)


def test_turned_inputs():
    """q, k, v as a projection leaves them: [B, S, H, D] seen as [B, H, S, D]."""
    q, k, v = (value.transpose(1, 2).contiguous().transpose(1, 2) for value in case(2, 3, 5, 7, 16))
    torch.testing.assert_close(attention(q, k, v), torch.from_numpy(by_hand(q, k, v)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    q, k, v = case(2, 2, 9, 11, 16, dtype)
    for out in (attention(q, k, v), attention_reference(q, k, v)):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), torch.from_numpy(by_hand(q, k, v)), rtol=0.02, atol=0.02)


def test_forward_mode_matches_finite_differences():
    """A fused kernel would refuse, or give a zero tangent."""
    inputs = case(1, 2, 3, 5, 4)
    moves = [torch.randn_like(value) for value in inputs]
    h = 1e-6
    ends = [[value + side * h * move for value, move in zip(inputs, moves, strict=True)] for side in (1, -1)]
    expected = torch.from_numpy(by_hand(*ends[0]) - by_hand(*ends[1])) / (2 * h)
    _, tangent = torch.func.jvp(attention, tuple(inputs), tuple(moves))
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-6)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(inputs, moves, strict=True)]
        found = torch.autograd.forward_ad.unpack_dual(attention(*duals)).tangent
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_disjoint_keys_merge_through_their_log_sum_exp():
    q, k, v = case(2, 3, 5, 12, 8)
    parts = [attention_with_lse(q, k[:, :, cut], v[:, :, cut]) for cut in (slice(0, 4), slice(4, 12))]
    total = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum((lse - total).exp()[..., None] * out for out, lse in parts)
    torch.testing.assert_close(merged, torch.from_numpy(by_hand(q, k, v)), rtol=1e-12, atol=1e-12)
    scores = np.einsum("bhqd,bhkd->bhqk", q.numpy(), k.numpy()) / np.sqrt(8)
    torch.testing.assert_close(total, torch.from_numpy(np.log(np.exp(scores).sum(-1))), rtol=1e-12, atol=1e-12)


def test_log_sum_exp_has_gradients_and_tangents():
    inputs = [value.requires_grad_(True) for value in case(1, 1, 2, 3, 4)]
    assert torch.autograd.gradcheck(attention_with_lse, inputs, check_forward_ad=True)


def test_large_scores_stay_finite():
    q, k, v = (100 * value for value in case(1, 1, 4, 5, 8, torch.float32))
    out, lse = attention_with_lse(q, k, v)
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_a_query_that_may_look_nowhere_gets_zeros(name, monkeypatch):
    monkeypatch.setenv("ONESTEP_ATTENTION", name)
    q, k, v = (value.requires_grad_(True) for value in case(1, 1, 2, 3, 4))
    mask = torch.tensor([[True, True, False], [False, False, False]])
    out = attention(q, k, v, mask)
    assert (out[..., 1, :] == 0).all() and out[..., 0, :].abs().min() > 0
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))
    assert attention_with_lse(q, k, v, mask)[1][..., 1].item() == -torch.inf


def test_an_unknown_or_failing_choice_is_refused_with_the_reason(monkeypatch):
    q, k, v = case(1, 1, 2, 3, 8)
    monkeypatch.setenv("ONESTEP_ATTENTION", "fastest")
    with pytest.raises(ValueError, match="'fastest': set it to auto, sdpa, xformers, reference"):
        attention(q, k, v)
    monkeypatch.setenv("ONESTEP_ATTENTION", "xformers")  # on a CPU it has no kernel, installed or not
    with pytest.raises(ValueError, match="asks for xformers, which fails here"):
        attention(q, k, v)


@pytest.mark.parametrize("name", ["auto", "sdpa", "xformers", "reference"])
def test_a_run_is_counted_whichever_is_asked_for(name, monkeypatch):
    """On the meta device nothing can be tried, and the back end of the card need not be installed here."""
    monkeypatch.setenv("ONESTEP_ATTENTION", name)
    q, k = (torch.empty(2, 3, tokens, 8, device="meta", requires_grad=True) for tokens in (5, 7))
    out = attention(q, k, k)
    out.sum().backward()
    assert out.shape == (2, 3, 5, 8) and q.grad.shape == q.shape


def test_the_first_call_may_come_under_inference_mode(monkeypatch):
    monkeypatch.setenv("ONESTEP_ATTENTION", "sdpa")
    with torch.inference_mode():
        q, k, v = case(1, 1, 2, 3, 24)
        torch.testing.assert_close(attention(q, k, v), torch.from_numpy(by_hand(q, k, v)), rtol=1e-10, atol=1e-10)


def test_backends_say_what_works():
    found = backends("cpu")
    assert found["sdpa"] == found["reference"] == "works"
    if importlib.util.find_spec("xformers") is None:
        assert found["xformers"] == "not installed"
    else:
        assert found["xformers"] != "works" and len(found["xformers"]) > 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_backend_agrees_on_a_gpu(dtype, monkeypatch):
    shape, tolerance = (2, 3, 33, 77, 64), 1e-5 if dtype == torch.float32 else 0.02
    q, k, v = (value.cuda() for value in case(*shape, dtype=dtype))
    working = [name for name, state in backends("cuda").items() if state == "works"]
    for mask in (None, torch.rand(1, 1, 1, 77, device="cuda") < 0.8):
        expected = attention_reference(q.double(), k.double(), v.double(), mask)
        for name in working:
            monkeypatch.setenv("ONESTEP_ATTENTION", name)
            torch.testing.assert_close(attention(q, k, v, mask).double(), expected, rtol=tolerance, atol=tolerance)
