"""Attention in parts: each against softmax in NumPy, joined again against the whole, fused kernels and derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from onestep.kernels import Partial, attention_with_lse, merge, partial, partial_attention

SHAPES = [(1, 1, 1, 1, 8), (2, 3, 5, 7, 16), (1, 2, 33, 77, 40), (2, 1, 9, 3, 3)]
FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def case(batch: int, heads: int, queries: int, keys: int, width: int, dtype=torch.float64) -> list[Tensor]:
    return [torch.randn(batch, heads, length, width, dtype=dtype) for length in (queries, keys, keys)]


def by_hand(q: Tensor, k: Tensor, v: Tensor, bias: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """softmax(q k^T / sqrt(D) + bias) v and log sum exp of the scores. bias: [Sk]."""
    q, k, v = (value.detach().double().numpy() for value in (q, k, v))
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(q.shape[-1]) + bias
    peak = scores.max(-1, keepdims=True)
    weights = np.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bhkd->bhqd", weights / total, v), (np.log(total) + peak)[..., 0]


def assert_close(found: tuple[Tensor, ...], expected: tuple[np.ndarray, ...], tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.detach().double().numpy(), theirs, rtol=tolerance, atol=tolerance)


def operations(run: Callable[[], object]) -> set[str]:
    """The names of torch's operations in a call."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    return {event.key for event in recorded.key_averages()}


# -- a part -----------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("differentiated", [False, True])
def test_equals_the_equation(shape: tuple[int, ...], dtype: torch.dtype, differentiated: bool) -> None:
    q, k, v = (value.requires_grad_(differentiated) for value in case(*shape, dtype=dtype))
    out, lse = partial_attention(q, k, v)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close((out, lse), by_hand(q, k, v), TOLERANCE[dtype])


@every_dtype
def test_the_fused_kernel_serves_whom_nobody_differentiates(dtype: torch.dtype) -> None:
    q, k, v = case(2, 3, 5, 7, 16, dtype)
    partial_attention(q, k, v)  # its trial is over
    assert FUSED in operations(lambda: partial_attention(q, k, v))
    leaf = v.clone().requires_grad_(True)
    assert FUSED not in operations(lambda: partial_attention(q, k, leaf))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert FUSED in operations(lambda: partial_attention(q, k, leaf))
    assert FUSED not in operations(lambda: torch.func.jvp(lambda v: partial_attention(q, k, v).out, (v,), (v,)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_first_call_may_come_under_any_mode(mode: Callable[[], object]) -> None:
    """The trial that decides for the rest of the run is the same in all of them."""
    partial._tried.cache_clear()
    with mode():
        q, k, v = case(1, 2, 5, 7, 24, torch.float32)
        assert_close(partial_attention(q, k, v), by_hand(q, k, v), 1e-5)
        assert partial._choice(q.device, q.dtype, 24) == "flash on the cpu"


def test_other_layouts() -> None:
    """Fused kernels read in strides along tokens, heads and batch, and never along a token's numbers."""
    q, k, v = case(2, 3, 5, 7, 16)
    expected = by_hand(q, k, v)
    turned = [value.transpose(1, 2).contiguous().transpose(1, 2) for value in (q, k, v)]
    columns = [value.mT.contiguous().mT for value in (q, k, v)]
    sliced = [torch.cat([value, value], 2)[:, :, : value.shape[2]] for value in (q, k, v)]
    interleaved = [torch.stack([value, -value], -1)[..., 0] for value in (q, k, v)]
    for layout in (turned, columns, sliced, interleaved):
        assert_close(partial_attention(*layout), expected, 1e-12)
    repeated = [value[:1].expand(2, -1, -1, -1) for value in (k, v)]
    assert_close(partial_attention(q, *repeated), by_hand(q, *(value.contiguous() for value in repeated)), 1e-12)


def test_shapes_that_a_fused_kernel_would_read_beside() -> None:
    """One text for all pictures, or values of another width, go the plain way; what is no attention is refused."""
    q, k, v = case(2, 3, 5, 7, 16)
    one = partial_attention(q, k[:1], v[:1])
    assert_close(one, by_hand(q, k[:1].expand_as(k), v[:1].expand_as(v)), 1e-12)
    wide = torch.randn(2, 3, 7, 20, dtype=torch.float64)
    assert_close(partial_attention(q, k, wide), by_hand(q, k, wide), 1e-12)
    for wrong in ((q, k[..., :8], v), (q, k, v[:, :, :6]), (q, k[:, :2], v), (q, k[..., :8], v[..., :8])):
        with pytest.raises(RuntimeError):
            partial_attention(*wrong)


@every_dtype
@pytest.mark.parametrize("differentiated", [False, True])
def test_no_keys_and_no_queries(dtype: torch.dtype, differentiated: bool) -> None:
    """A fused kernel would end the whole process by a division by zero."""
    q, k, v = (value.requires_grad_(differentiated) for value in case(2, 3, 5, 7, 16, dtype))
    empty = partial_attention(q, k[:, :, :0], v[:, :, :0])
    assert empty.out.shape == q.shape and (empty.out == 0).all() and empty.out.dtype == dtype
    assert empty.lse.shape == (2, 3, 5) and (empty.lse == -math.inf).all()
    some = partial_attention(q, k, v)
    for merged in (merge(some, empty), merge(empty, some), merge(empty, some, empty)):
        assert torch.equal(merged, some.out)
        if differentiated:
            assert all(
                grad.isfinite().all() for grad in torch.autograd.grad(merged.sum(), (q, k, v), retain_graph=True)
            )
    nobody = partial_attention(q[:, :, :0], k, v)
    assert nobody.out.shape == (2, 3, 0, 16) and nobody.lse.shape == (2, 3, 0)


def test_autocast_leaves_what_it_finds() -> None:
    """Queries and keys may be float32 there beside half values; sums and exponentials are float32 in any case."""
    q, k, v = case(2, 3, 5, 7, 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = partial_attention(q, k, v.bfloat16())
        assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
        assert_close((out, lse), by_hand(q, k, v), TOLERANCE[torch.bfloat16])
        leaf = q.clone().requires_grad_(True)
        assert_close(partial_attention(leaf, k, v), by_hand(q, k, v), 1e-5)


# -- parts joined -----------------------------------------------------------------------------------------------------


def check_merge(module: ModuleType) -> None:
    """All keys at once, from up to four parts; a bias to the scores and a factor to the values of one of them."""
    q, k, v = case(2, 3, 5, 12, 8)
    for cuts in ([12], [5, 7], [3, 1, 8], [2, 4, 5, 1]):
        texts = zip(k.split(cuts, 2), v.split(cuts, 2), strict=True)
        parts = [module.Partial(*partial_attention(q, *text)) for text in texts]
        assert_close((module.merge(*parts),), by_hand(q, k, v)[:1], 1e-12)
        joined = parts[0]
        for part in parts[1:]:
            joined = joined.joined(part)
        assert_close(joined, by_hand(q, k, v), 1e-12)
        last = np.arange(12) >= 12 - cuts[-1]
        changed = [*parts[:-1], parts[-1].shifted(0.7).scaled(-2.0)]
        expected = by_hand(q, k, v * torch.from_numpy(np.where(last, -2.0, 1.0))[:, None], np.where(last, 0.7, 0.0))
        assert_close((module.merge(*changed),), expected[:1], 1e-12)


def test_parts_merge_to_the_whole() -> None:
    check_merge(partial)


@pytest.mark.parametrize("gap", [50.0, 1e4, 1e30])
def test_parts_far_apart_do_not_overflow(gap: float) -> None:
    """The part with the far larger scores is all there is; the other neither adds nor turns it into NaN."""
    for dtype in TOLERANCE:
        one, two = (Partial(*partial_attention(*case(1, 2, 3, 4, 8, dtype))) for _ in range(2))
        for near, far in (
            (one, two.shifted(-gap)),
            (one.shifted(gap), two),
            (one.shifted(-gap), two.shifted(-3 * gap)),
        ):
            for merged in (near.joined(far), far.joined(near)):
                assert merged.lse.isfinite().all()
                torch.testing.assert_close(merged.out, near.out, rtol=1e-6, atol=1e-6)


def test_large_scores_stay_finite() -> None:
    """Scores of some +-1e4, as an unnormalised query of a real network may have."""
    q, k, v = case(1, 2, 4, 12, 8, torch.float32)
    for differentiated in (False, True):
        leaf = (100 * q).requires_grad_(differentiated)
        parts = [partial_attention(leaf, 100 * a, b) for a, b in zip(k.split(4, 2), v.split(4, 2), strict=True)]
        assert max(float(part.lse.detach().abs().max()) for part in parts) > 5e3
        assert_close((merge(*parts),), by_hand(100 * q, 100 * k, v)[:1], 1e-4)
        if differentiated:
            (grad,) = torch.autograd.grad(merge(*parts).square().sum(), leaf)
            assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cuts", [[500, 100], [100, 500], [300, 300], [446, 77, 77]], ids=str)
def test_half_precision_is_as_good_as_that_of_plain_attention(dtype: torch.dtype, cuts: list[int]) -> None:
    """Shares of the parts have the outputs' precision: within twice the error of attention over all keys at once."""
    for sharpness in (1, 4):
        q, k, v = (value.to(dtype) for value in case(1, 4, 600, 600, 64))
        q = sharpness * q
        expected, _ = by_hand(q, k, v)

        def error(out: Tensor, expected: np.ndarray = expected) -> float:
            return float(np.sqrt(np.mean((out.double().numpy() - expected) ** 2)))

        texts = zip(k.split(cuts, 2), v.split(cuts, 2), strict=True)
        merged = merge(*(partial_attention(q, *text) for text in texts))
        assert error(merged) < 2 * error(torch.nn.functional.scaled_dot_product_attention(q, k, v))


# -- derivatives ------------------------------------------------------------------------------------------------------


def halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in two parts, one of which is moved and turned."""
    one, two = (partial_attention(q, *text) for text in zip(k.split(3, 2), v.split(3, 2), strict=True))
    return merge(one, two.shifted(-0.3).scaled(-1.5))


def test_gradients_and_tangents_match_finite_differences() -> None:
    inputs = [value.requires_grad_(True) for value in case(1, 2, 2, 6, 3)]
    assert torch.autograd.gradcheck(partial_attention, inputs, check_forward_ad=True)
    assert torch.autograd.gradcheck(halves, inputs, check_forward_ad=True)


def test_forward_mode_matches_finite_differences() -> None:
    """Also where no gradient is wanted, which alone would take the fused kernel: it has no tangents."""
    inputs, h = case(1, 2, 3, 6, 4), 1e-6
    moves = [torch.randn_like(value) for value in inputs]
    with torch.no_grad():
        ends = [[a + side * h * move for a, move in zip(inputs, moves, strict=True)] for side in (1, -1)]
        expected = (halves(*ends[0]) - halves(*ends[1])) / (2 * h)
        _, tangent = torch.func.jvp(halves, tuple(inputs), tuple(moves))
        torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-7)
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(inputs, moves, strict=True)]
            found = torch.autograd.forward_ad.unpack_dual(halves(*duals)).tangent
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


# -- kernels that fail ------------------------------------------------------------------------------------------------


def wrong_output(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return attention_with_lse(q, v, k)


def wrong_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = attention_with_lse(q, k, v)
    return out, lse / math.log(2)


def not_a_number(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = attention_with_lse(q, k, v)
    return out, lse * math.nan


def not_built(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no kernel for this card")


@pytest.mark.parametrize("kernel", [wrong_output, wrong_lse, not_a_number, not_built])
def test_a_kernel_that_is_wrong_is_not_used(kernel: partial.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(partial._KERNELS, "flash on the cpu", kernel)
    partial._tried.cache_clear()
    q, k, v = case(1, 2, 5, 7, 16)
    assert_close(partial_attention(q, k, v), by_hand(q, k, v), 1e-12)
    assert partial._choice(q.device, q.dtype, 16) == "plain"
    partial._tried.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_fused_kernels_of_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = (value.to("cuda", dtype) for value in case(*shape))
    assert partial._choice(q.device, dtype, shape[-1]) != "plain"
    found = [part.cpu() for part in partial_attention(q, k, v)]
    assert_close(tuple(found), by_hand(q.cpu(), k.cpu(), v.cpu()), max(TOLERANCE[dtype], 0.005))


# -- wrong equations --------------------------------------------------------------------------------------------------

MUTANTS = {
    "the shares exchanged": ("torch.sigmoid(other.lse - self.lse)", "torch.sigmoid(self.lse - other.lse)"),
    "equal shares": ("torch.sigmoid(other.lse - self.lse)", "torch.sigmoid(0 * self.lse)"),
    "unnormalised": ("torch.sigmoid(other.lse - self.lse)", "torch.exp(other.lse - self.lse)"),
    "the parts exchanged": ("torch.lerp(self.out, other.out, share)", "torch.lerp(other.out, self.out, share)"),
    "the larger lse alone": ("torch.logaddexp(self.lse, other.lse)", "torch.maximum(self.lse, other.lse)"),
    "the lse of the first": ("torch.logaddexp(self.lse, other.lse)", "self.lse"),
    "the bias subtracted": ("self.lse + bias", "self.lse - bias"),
    "the factor in the scores": ("Partial(self.out * factor, self.lse)", "Partial(self.out, self.lse * factor)"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_equation_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    must_fail(check_merge, mutant("onestep.kernels.partial", *change, monkeypatch))
