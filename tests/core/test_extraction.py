"""The difference of two checkpoints as a LoRA, against NumPy and against what no other factors can do better."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onestep.core.errors import OneStepError
from onestep.core.extraction import extract, in_all, kept, low_rank, of_all, root_of, svd, weight_of
from onestep.core.targets import Target

SHAPES = {"linear": (7, 5), "wide": (4, 9), "conv": (6, 4, 3, 3)}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment_of(inputs: int) -> Tensor:
    x = drawn(inputs, 40, seed=3) * torch.logspace(-1, 1, inputs)[:, None]
    return x @ x.T / 40


def product(factors: tuple[Tensor, Tensor]) -> Tensor:
    a, b = factors
    return (b.flatten(1) @ a.flatten(1)).reshape(len(b), *a.shape[1:])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("seen", [False, True])
def test_at_full_rank_the_difference_itself(shape: tuple[int, ...], seen: bool) -> None:
    difference = drawn(*shape)
    factors = low_rank(difference, 4096, moment_of(shape[1]) if seen else None)
    torch.testing.assert_close(product(factors), difference, rtol=0, atol=1e-5)
    assert factors[0].shape[1:] == shape[1:] and factors[1].shape[2:] == tuple(1 for _ in shape[2:])


def test_plain_is_numpys_svd() -> None:
    difference = drawn(7, 5)
    u, s, v = np.linalg.svd(difference.double().numpy())
    expected = (u[:, :2] * s[:2]) @ v[:2]
    np.testing.assert_allclose(product(low_rank(difference, 2)).numpy(), expected, atol=1e-5)
    share = kept(difference, low_rank(difference, 2))
    assert share.weights == pytest.approx((s[:2] ** 2).sum() / (s**2).sum(), rel=1e-6) and share.outputs is None


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_the_svd_is_one(shape: tuple[int, int]) -> None:
    matrix = drawn(*shape).double() * torch.logspace(-7, 1, shape[1], dtype=torch.float64)
    u, s, v = svd(matrix)
    torch.testing.assert_close(u * s @ v, matrix, rtol=0, atol=1e-13)
    np.testing.assert_allclose(s.numpy(), np.linalg.svd(matrix.numpy())[1], atol=1e-7)
    smaller = u if shape[0] <= shape[1] else v.T
    torch.testing.assert_close(smaller.T @ smaller, torch.eye(min(shape)).double(), rtol=0, atol=1e-12)
    assert svd(torch.zeros(3, 4, dtype=torch.float64))[2].isfinite().all()


def test_whitened_is_numpys() -> None:
    difference, moment = drawn(7, 5), moment_of(5)
    root = np.linalg.cholesky(moment.double().numpy() + 1e-4 * np.trace(moment.double().numpy()) / 5 * np.eye(5))
    u, s, v = np.linalg.svd(difference.double().numpy() @ root)
    expected = (u[:, :2] * s[:2]) @ v[:2] @ np.linalg.inv(root)
    np.testing.assert_allclose(product(low_rank(difference, 2, moment)).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(root_of(moment).numpy(), root, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_each_is_the_best_at_what_it_is_for(shape: tuple[int, ...]) -> None:
    """Whitened keeps more of the outputs, plain more of the weights; and both more than factors moved a little."""
    difference, moment = drawn(*shape), moment_of(shape[1])
    plain, white = low_rank(difference, 2), low_rank(difference, 2, moment)
    of_plain, of_white = kept(difference, plain, moment), kept(difference, white, moment)
    assert of_white.outputs > of_plain.outputs + 0.01 and of_plain.weights > of_white.weights + 0.01
    for seed in range(20):
        moved = [factor + 0.03 * drawn(*factor.shape, seed=seed) for factor in white]
        assert kept(difference, (moved[0], moved[1]), moment).outputs < of_white.outputs


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_share_of_outputs_is_that_of_real_inputs(shape: tuple[int, ...]) -> None:
    """On samples whose second moment is the one given, through the layer itself."""
    x = drawn(200, shape[1], seed=5) * torch.linspace(0.2, 2, shape[1])
    difference, moment = drawn(*shape), x.T @ x / len(x)
    factors = low_rank(difference, 2, moment)
    taps = difference.flatten(2) if len(shape) > 2 else difference[..., None]
    wrong = (difference - product(factors)).flatten(2) if len(shape) > 2 else (difference - product(factors))[..., None]
    size, left = (float(torch.einsum("oik,ni->nok", m, x).square().sum()) for m in (taps, wrong))
    assert kept(difference, factors, moment).outputs == pytest.approx(1 - left / size, rel=1e-4)


class Fused(nn.Module):
    """Query and key in one layer, the key's rows stored backwards."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 6, bias=False)
        self.layer.weight.data = drawn(6, 5, seed=seed)


def targets(network: Fused) -> list[Target]:
    backwards = torch.tensor([2, 1, 0])
    return [
        Target("q", network.layer, slice(0, 3)),
        Target("k", network.layer, slice(3, 6), backwards),
    ]


def test_rows_and_their_order_are_the_targets() -> None:
    before, after = Fused(0), Fused(1)
    few = {target.name: target for target in targets(after)}
    state, layers = of_all(extract(targets(before), weight_of, lambda target: weight_of(few[target.name]), 8))
    wanted = after.layer.weight - before.layer.weight
    torch.testing.assert_close(product(state["q"]), wanted[:3], rtol=0, atol=1e-5)
    torch.testing.assert_close(product(state["k"]), wanted[3:].flip(0), rtol=0, atol=1e-5)
    assert in_all(layers).weights == pytest.approx(1)


def test_the_whole_is_weighed_by_size() -> None:
    big, small = drawn(7, 5) * 10, drawn(7, 5, seed=1)
    layers = {"big": kept(big, low_rank(big, 1)), "small": kept(small, low_rank(small, 5))}
    total = big.square().sum() + small.square().sum()
    left = (big - product(low_rank(big, 1))).square().sum()
    assert in_all(layers).weights == pytest.approx(1 - float(left / total), rel=1e-5)


def broken(weight: Tensor) -> Tensor:
    return weight * float("nan")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda weight: weight, "nothing to extract"),
        (broken, "no number"),
        (lambda weight: weight[:, :3], r"\[3, 5\] in the base and \[3, 3\] in the few-step"),
    ],
)
def test_what_is_no_pair_is_refused(change: Callable[[Tensor], Tensor], why: str) -> None:
    with pytest.raises(OneStepError, match=why):
        of_all(extract(targets(Fused(0)), weight_of, lambda target: change(weight_of(target)), 2))


def test_quantised_weights_and_ranks_out_of_range_are_refused() -> None:
    network = Fused(0)
    with pytest.raises(OneStepError, match="rank is 0"):
        of_all(extract(targets(network), weight_of, weight_of, 0))
    network.layer.weight = nn.Parameter(torch.zeros(6, 5, dtype=torch.int8), requires_grad=False)
    with pytest.raises(OneStepError, match="quantised"):
        weight_of(targets(network)[0])


def test_a_layer_that_sees_one_direction_alone_has_a_root() -> None:
    """As after a norm with a large bias: sums in float32 leave eigenvalues below 0, by more than the floor."""
    x = torch.ones(20000, 1) * drawn(1280) + 1e-4 * drawn(20000, 1280, seed=1)
    moment = torch.zeros(1280, 1280).addmm_(x.T, x) / len(x)
    moment = moment + 2e-4 * moment.diagonal().mean() * _rough(1280)
    root = root_of(moment)
    assert root.isfinite().all() and float((root @ root.T - moment.double()).abs().max()) < 0.05
    difference = drawn(6, 1280, seed=2)
    torch.testing.assert_close(product(low_rank(difference, 4096, moment)), difference, rtol=0, atol=1e-4)
    with pytest.raises(OneStepError, match="is no number on these prompts"):
        root_of(torch.full((3, 3), float("nan")))


def _rough(count: int) -> Tensor:
    """Symmetric, its least eigenvalue near -1."""
    noise = drawn(count, count, seed=4)
    noise = noise + noise.T
    return noise / torch.linalg.eigvalsh(noise).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_two_files_of_one_model_do_not_differ(dtype: torch.dtype, turned: bool) -> None:
    """One in float32, one in half of it: what rounding leaves is no difference, and a real one stays."""
    layers = {name: nn.Linear(8, 8, bias=False) for name in ("same", "other")}
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    short = {name: value.to(dtype).float() for name, value in weights.items()}
    short["other"] = (weights["other"] + 0.1 * drawn(8, 8)).to(dtype).float()
    targets = [Target(name, layer) for name, layer in layers.items()]
    sides = [lambda target: weights[target.name], lambda target: short[target.name]]
    found, _ = of_all(extract(targets, *(sides[::-1] if turned else sides), 8))
    assert set(found) == {"other"}
    change = short["other"] - weights["other"]
    torch.testing.assert_close(product(found["other"]), -change if turned else change, rtol=0, atol=1e-5)
