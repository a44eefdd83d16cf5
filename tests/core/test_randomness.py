"""Every random number is a function of (seed, stream, step, sample) alone, and the functions are unlike each other."""

from __future__ import annotations

import hashlib

import pytest
import torch

from onestep.core.randomness import generator, integers, normal, uniform

KEY = (3, "latent", 7)


def test_a_sample_is_the_same_in_any_batch() -> None:
    """So halved micro-batches, accumulation and several processes see the same numbers."""
    whole = normal((2, 3), *KEY, range(6))
    for start, stop in [(0, 3), (3, 6), (5, 6)]:
        assert torch.equal(normal((2, 3), *KEY, range(start, stop)), whole[start:stop])
    assert torch.equal(uniform(*KEY, range(6))[2:4], uniform(*KEY, [2, 3]))
    assert torch.equal(integers(1000, *KEY, range(6))[2:4], integers(1000, *KEY, [2, 3]))


def test_nothing_else_draws_or_is_drawn_from() -> None:
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), normal((4,), *KEY, range(3))
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    torch.manual_seed(2)
    assert torch.equal(normal((4,), *KEY, range(3)), first)


@pytest.mark.parametrize(
    "other", [(4, "latent", 7), (3, "latents", 7), (3, "latent", 8), (37, "latent", 7), (3, "latent7", 0)]
)
def test_every_part_of_the_key_counts(other: tuple[int, str, int]) -> None:
    assert not torch.equal(normal((8,), *KEY, [0]), normal((8,), *other, [0]))


def test_keys_do_not_run_into_each_other() -> None:
    """(1, 23) is not (12, 3): parts are told apart."""
    states = [generator(*key).get_state() for key in [(1, "a", 23, 4), (12, "a", 3, 4), (1, "a", 2, 34)]]
    assert len({bytes(state.numpy()) for state in states}) == 3


def test_they_are_normal_and_uniform_and_uncorrelated() -> None:
    """Moments of 20,000 numbers, within five standard errors."""
    z = normal((20,), 0, "z", 0, range(1000))
    assert abs(float(z.mean())) < 5 / 20_000**0.5 and abs(float(z.var()) - 1) < 5 * (2 / 20_000) ** 0.5
    assert abs(float((z**4).mean()) - 3) < 5 * (96 / 20_000) ** 0.5
    neighbours = (z[1:] * z[:-1]).mean()
    assert abs(float(neighbours)) < 5 / 20_000**0.5
    streams = (z * normal((20,), 0, "y", 0, range(1000))).mean()
    assert abs(float(streams)) < 5 / 20_000**0.5
    u = uniform(0, "u", 0, range(4000))
    assert u.dtype == torch.float64 and float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / 4000) ** 0.5
    whole = integers(5, 0, "i", 0, range(4000))
    counts = torch.bincount(whole, minlength=5)
    assert len(counts) == 5 and bool(((counts - 800).abs() < 5 * (4000 * 0.2 * 0.8) ** 0.5).all())


def test_the_numbers_are_for_ever() -> None:
    """A file can be made again from its settings only while a key keeps its seed: SHA-256 of its parts, 63 bits."""
    digest = hashlib.sha256(b"0\x00latent\x000\x000").digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    assert generator(0, "latent", 0, 0).initial_seed() == seed == 0x14E0AD8343172565
    wanted = torch.randn(4, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(normal((4,), 0, "latent", 0, [0])[0], wanted)
