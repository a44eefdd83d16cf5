"""Measures against closed forms, written here in NumPy."""

from __future__ import annotations

import math
import mmap

import numpy as np
import pytest
import torch

from onestep.training.evaluation import measures as m


def spd(seed: int, width: int) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(width, width))
    return factor @ factor.T + 0.1 * np.eye(width)


def exact(mean: np.ndarray, cov: np.ndarray, count: int, seed: int = 0) -> torch.Tensor:
    """[count, F] numbers whose sample mean and covariance (over N - 1) are these to rounding."""
    raw = np.random.default_rng(seed).normal(size=(count, len(mean)))
    raw -= raw.mean(0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(raw.T @ raw / (count - 1))).T
    return torch.from_numpy(white @ np.linalg.cholesky(cov).T + mean)


def test_frechet_of_gaussians_that_commute():
    # |m - n|^2 + sum (sqrt(a) - sqrt(b))^2 for diagonal covariances
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.25])
    m_a, m_b = np.array([0.0, 1.0, -2.0]), np.array([1.0, 1.0, 1.0])
    wanted = ((m_a - m_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = m.gaussian_frechet(*map(torch.from_numpy, (m_a, np.diag(a), m_b, np.diag(b))))
    assert found == pytest.approx(wanted, rel=1e-12)


def test_frechet_of_samples_with_any_covariances():
    # tr (A B)^(1/2) is the sum of the roots of A B's eigenvalues, here by NumPy's general solver
    cov_a, cov_b = spd(1, 6), spd(2, 6)
    m_a, m_b = np.zeros(6), np.linspace(-1, 1, 6)
    cross = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real).sum()
    wanted = ((m_a - m_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    a, b = exact(m_a, cov_a, 50, 3), exact(m_b, cov_b, 70, 4)
    assert m.frechet(a, b) == pytest.approx(wanted, rel=1e-9)
    assert m.frechet(b, a) == pytest.approx(wanted, rel=1e-9)


def test_frechet_of_a_set_with_itself_is_nothing_even_where_it_is_flat():
    x = torch.randn(20, 4, dtype=torch.float64)
    flat = torch.cat([x, x[:, :2], torch.zeros(20, 3, dtype=torch.float64)], 1)
    assert m.frechet(flat, flat) < 1e-6


def test_the_root_of_a_matrix_squared_is_the_matrix():
    matrix = torch.from_numpy(spd(5, 8))
    root = m.symmetric_root(matrix)
    assert torch.allclose(root @ root, matrix, atol=1e-12)


def test_sliced_wasserstein_in_one_dimension_is_the_quantile_distance():
    a, b = np.random.default_rng(0).normal(size=40), np.random.default_rng(1).exponential(size=40)
    wanted = math.sqrt(((np.sort(a) - np.sort(b)) ** 2).mean())
    found = m.sliced_wasserstein(torch.from_numpy(a)[:, None], torch.from_numpy(b)[:, None])
    assert found == pytest.approx(wanted, rel=1e-5)


def test_sliced_wasserstein_of_a_move_is_its_length_over_the_root_of_the_width():
    # moving by d costs u.d along u; E (u.d)^2 = |d|^2 / D over unit vectors u
    x = torch.randn(64, 3, 4, 4)
    move = torch.randn(3, 4, 4)
    wanted = float(move.norm()) / math.sqrt(move.numel())
    assert m.sliced_wasserstein(x, x + move, directions=20_000) == pytest.approx(wanted, rel=0.03)


def test_sliced_wasserstein_knows_no_order_and_one_seed():
    a, b = torch.randn(30, 12), torch.randn(30, 12)
    assert m.sliced_wasserstein(a, b) == pytest.approx(m.sliced_wasserstein(a.flip(0), b), rel=1e-6)
    assert m.sliced_wasserstein(a, a[torch.randperm(30)]) < 1e-6
    assert m.sliced_wasserstein(a, b, seed=1) != m.sliced_wasserstein(a, b, seed=2)


def test_kernel_distance_is_its_double_sums():
    a, b = np.random.default_rng(0).normal(size=(7, 3)), np.random.default_rng(1).normal(size=(5, 3))

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / 3 + 1) ** 3

    within_a = np.mean([kernel(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
    within_b = np.mean([kernel(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    between = np.mean([kernel(x, y) for x in a for y in b])
    found = m.kernel_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(within_a + within_b - 2 * between, rel=1e-12)


def test_kernel_distance_has_no_bias():
    generator = torch.Generator().manual_seed(0)
    drawn = [m.kernel_distance(*torch.randn(2, 8, 2, generator=generator)) for _ in range(2000)]
    mean, error = np.mean(drawn), np.std(drawn) / math.sqrt(len(drawn))
    assert abs(mean) < 3 * error and np.std(drawn) > 10 * abs(mean)


def test_variety_is_the_mean_distance_within_a_prompt():
    # three pictures of two elements at (0, 0), (3, 4), (6, 8): distances 5, 5, 10, each over sqrt(2)
    x = torch.tensor([[0.0, 0], [3, 4], [6, 8], [7, 7], [7, 7], [7, 7]])
    assert m.variety(x, 3).tolist() == pytest.approx([20 / 3 / math.sqrt(2), 0.0])
    assert m.variety(x, 1).tolist() == [0.0] * 6


def test_obeyed_counts_only_what_was_asked():
    chosen, asked = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2, -1, 2])
    assert m.obeyed(chosen, asked) == pytest.approx(2 / 3)
    assert math.isnan(m.obeyed(chosen, torch.full((4,), -1)))


def test_the_interval_of_a_mean_is_its_standard_error():
    x = torch.randn(400, dtype=torch.float64)
    found = m.bootstrap(lambda rows: float(x[rows].mean()), 400, 1, draws=2000)
    half = 1.96 * float(x.std()) / math.sqrt(400)
    assert found.value == pytest.approx(float(x.mean()))
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)


def test_pictures_of_one_prompt_are_redrawn_together():
    """Four copies of each number tell no more than one: the interval is that of the prompts."""
    x = torch.randn(100, dtype=torch.float64)
    once = m.bootstrap(lambda rows: float(x[rows].mean()), 100, 1, seed=1)
    four = x.repeat_interleave(4)
    together = m.bootstrap(lambda rows: float(four[rows].mean()), 100, 4, seed=1)
    assert (together.value, together.low, together.high) == pytest.approx((once.value, once.low, once.high), rel=1e-9)
    apart = m.bootstrap(lambda rows: float(four[rows].mean()), 400, 1, seed=1)
    assert apart.high - apart.low == pytest.approx((once.high - once.low) / 2, rel=0.25)


def test_a_seed_gives_one_interval():
    x = torch.randn(30, dtype=torch.float64)
    first, again, other = (m.bootstrap(lambda rows: float(x[rows].mean()), 30, 1, seed) for seed in (5, 5, 6))
    assert first == again != other


@pytest.mark.skipif(not (m.PROC / "clear_refs").exists(), reason="only Linux tells a peak anew")
def test_the_peak_is_that_since_the_last_reset():
    device = torch.device("cpu")
    m.reset_peak(device)
    before, counted = m.peak_bytes(device)
    block = mmap.mmap(-1, 64 * 2**20)  # new pages, where an allocator may have some left
    torch.frombuffer(block, dtype=torch.uint8).fill_(1)
    inside, _ = m.peak_bytes(device)
    del block
    m.reset_peak(device)
    assert counted == "resident in main memory"
    assert inside - before > 60 * 2**20
    assert inside - m.peak_bytes(device)[0] > 30 * 2**20
