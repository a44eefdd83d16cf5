"""Negative steering against its equations in NumPy, against the doubled network, and against finite differences."""

from __future__ import annotations

import inspect
import itertools
import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from narrowed import narrowed
from steering_oracle import (
    EMPTY,
    Array,
    attend,
    beside,
    crossed,
    doubled_by_hand,
    drawn,
    nag_by_hand,
    norms,
    numpied,
    steer_by_hand,
    streams,
)
from torch import Tensor

from onestep.core import guidance
from onestep.core.guidance import Steering, Streams, nag, nasa, perp
from onestep.kernels import partial, steered

GIVEN = {
    "nasa": Steering("nasa", 0.3),
    "nasa, strong": Steering("nasa", 1.5),
    "nag": Steering("nag", 4.0, tau=5.0, alpha=0.25, order=1),
    "nag, Euclidean": Steering("nag", 4.0, tau=5.0, alpha=0.25, order=2),
    "nag, not blended": Steering("nag", 3.0, tau=3.7, alpha=1.0),
    "nag, not limited": Steering("nag", 2.0, tau=100.0, alpha=0.5),
    "nag, fractional": Steering("nag", 2.5, tau=3.1, alpha=0.7, order=1.5),
    "vsf": Steering("vsf", 2.0, offset=0.7),
    "vsf, flipped alone": Steering("vsf", 1.0, offset=0.0),
    "vsf, muted": Steering("vsf", 0.0, offset=0.1),
    "perp": Steering("perp", 4.0, tau=8.4, alpha=0.25, weight=1.5, keep=1.0),
    "perp, spared": Steering("perp", 3.0, tau=12.0, alpha=0.5, order=2, weight=2.0, keep=2.5),
}
CASES = {name: steering.of_family("unet") for name, steering in GIVEN.items()}
every_case = pytest.mark.parametrize("steering", CASES.values(), ids=list(CASES))


def tail(steering: Steering) -> int:
    return EMPTY if steering.wants_empty else 0


def of(module: ModuleType, steering: Steering) -> Any:
    """The same steering in a mutant of its module."""
    return module.Steering(**vars(steering))


# -- the equations ----------------------------------------------------------------------------------------------------


def check_cross(module: ModuleType, steering: Steering) -> None:
    q, *texts = crossed()
    k, v, k_neg, v_neg = numpied(*texts)
    nothing, added = (k[:, :, :0], v[:, :, :0]), numpied(*drawn(7))[0]
    other = torch.from_numpy(attend(q.numpy(), k, v) + added)
    for told, more in ((None, 0.0), (other, added)):
        found = of(module, steering).cross(q, *texts[:2], (texts[2], texts[3]), told, tail(steering))
        expected = steer_by_hand(steering, q.numpy(), (k, v), (k_neg, v_neg), nothing, more)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)


def check_joint(module: ModuleType, steering: Steering, rows: Tensor | None = None) -> None:
    q, k, v = streams()
    found = of(module, steering).joint(*(module.Streams(*part) for part in (q, k, v)), rows=rows, empty=tail(steering))
    q, k, v = (Streams(*numpied(*part)) for part in (q, k, v))
    positive, negative, image = doubled_by_hand(steering, q, k, v)
    if rows is not None:
        plain = attend(q[2], *(np.concatenate([part[0], part[2]], 2) for part in (k, v)))
        image = np.where(rows.numpy()[:, None, None, None], image, plain)
    for ours, theirs in zip(found, (positive, negative, image), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-10, atol=1e-12)


@every_case
def test_cross_attention_is_steered_by_the_equations(steering: Steering) -> None:
    check_cross(guidance, steering)


@every_case
@pytest.mark.parametrize("rows", [None, [True, False], [False, False], [True, True]], ids=str)
def test_joint_attention_is_that_of_the_doubled_network(steering: Steering, rows: list[bool] | None) -> None:
    check_joint(guidance, steering, None if rows is None else torch.tensor(rows))


@pytest.mark.parametrize("name", ["nasa", "nag", "vsf"])
def test_what_fills_the_negative_up_is_hidden_from_vsfs_picture_alone(name: str) -> None:
    """The last two of its four tokens; the texts are as they were."""
    q, k, v = streams()
    found, whole = (CASES[name].joint(q, k, v, filling=filling) for filling in (2, 0))
    cut = [Streams(*numpied(p.positive, p.negative[:, :, :2], p.image)) for p in (q, k, v)]
    image = doubled_by_hand(CASES[name], *cut)[2] if name == "vsf" else whole.image.numpy()
    np.testing.assert_allclose(found.image.numpy(), image, rtol=1e-10, atol=1e-12)
    assert torch.equal(found.positive, whole.positive) and torch.equal(found.negative, whole.negative)
    assert torch.equal(found.image, whole.image) == (name != "vsf")


@pytest.mark.parametrize("name", ["nag", "nag, Euclidean", "nag, not blended", "nag, fractional"])
@pytest.mark.parametrize("joint", [False, True])
def test_the_limit_acts_on_some_tokens_and_not_on_others(name: str, joint: bool) -> None:
    """The comparisons above are worth something only where both sides of min(r, tau) are taken."""
    steering = CASES[name]
    if joint:
        q, k, v = (numpied(*part) for part in streams())
        z_pos, z_neg = (attend(q[2], *beside((k[i], v[i]), (k[2], v[2]))) for i in (0, 1))
    else:
        queries, *texts = numpied(*crossed())
        z_pos, z_neg = attend(queries, *texts[:2]), attend(queries, *texts[2:])
    ratio = norms(steering.scale * z_pos - (steering.scale - 1) * z_neg, steering.order) / norms(z_pos, steering.order)
    assert ratio.min() < 0.95 * steering.tau and 1.05 * steering.tau < ratio.max()


def network_by_hand(steering: Steering, weights: Array, texts: tuple[Array, Array], image: Array) -> list[Array]:
    """Three layers of the doubled network: after each, both pictures are overwritten by the steered one."""
    states = [*texts, image]
    for w in weights:
        parts = [[np.einsum("bhnd,hde->bhne", x, w[kind]) for x in states] for kind in range(3)]
        states = [x + found for x, found in zip(states, doubled_by_hand(steering, *parts), strict=True)]
    return states


@every_case
def test_one_picture_is_enough_for_a_whole_network(steering: Steering) -> None:
    """What a layer does to the picture reaches both texts in the next: the error does not grow with depth."""
    weights = 0.5 * torch.randn(3, 3, 3, 4, 4, dtype=torch.float64)
    states = drawn(5, 4, 7)
    expected = network_by_hand(steering, weights.numpy(), tuple(numpied(*states[:2])), numpied(states[2])[0])
    for w in weights:
        parts = [Streams(*(torch.einsum("bhnd,hde->bhne", x, w[kind]) for x in states)) for kind in range(3)]
        states = [x + found for x, found in zip(states, steering.joint(*parts, empty=tail(steering)), strict=True)]
    for ours, theirs in zip(states, expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("scale", [1.25, 2.0, 5.0])
@pytest.mark.parametrize("order", [1, 2])
def test_unlimited_nag_is_nasa(scale: float, order: int) -> None:
    """s Z+ - (s - 1) Z- = s (Z+ - (s - 1) / s Z-)"""
    positive, negative = drawn(7, 7)
    expected = scale * nasa(positive, negative, (scale - 1) / scale)
    torch.testing.assert_close(nag(positive, negative, scale, math.inf, 1.0, order), expected, rtol=1e-12, atol=1e-12)
    limited = Steering("nag", scale, 100.0, 1.0, order, 0.0)
    torch.testing.assert_close(limited.apart(positive, negative), expected, rtol=1e-12, atol=1e-12)


def test_nag_is_perp_that_weighs_and_spares_nothing() -> None:
    """Z+ + (s - 1) ((Z+ - Z0) - (Z- - Z0)), whatever Z0 is."""
    positive, negative, empty = drawn(7, 7, 7)
    found = perp(positive, negative, empty, 4.0, 1.0, 0.0, 2.5, 0.25)
    torch.testing.assert_close(found, nag(positive, negative, 4.0, 2.5, 0.25), rtol=1e-12, atol=1e-12)


def test_what_perp_spares_it_does_not_move_along() -> None:
    """keep = 1: a negative that wants what the prompt wants, and more, changes nothing that the prompt alone does not;
    keep = 2 turns it to the prompt's favour."""
    positive, empty, other = drawn(7, 7, 7)
    a = positive - empty
    other = other - (a * other).sum(3, keepdim=True) / (a * a).sum(3, keepdim=True) * a
    told = {"tau": math.inf, "alpha": 1.0}
    alone = perp(positive, empty, empty, 3.0, 1.5, 1.0, **told)
    both = perp(positive, empty + 0.7 * (positive - empty) + other, empty, 3.0, 1.5, 1.0, **told)
    torch.testing.assert_close(both, alone - 2 * 1.5 * other, rtol=1e-12, atol=1e-12)
    turned = perp(positive, empty + 0.7 * (positive - empty), empty, 3.0, 1.5, 2.0, **told)
    torch.testing.assert_close(turned, alone + 2 * 1.5 * 0.7 * a, rtol=1e-12, atol=1e-12)
    against = perp(positive, empty - 0.7 * a, empty, 3.0, 1.5, 2.0, **told)  # nothing shared
    torch.testing.assert_close(against, alone + 2 * 1.5 * 0.7 * a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_perp_spares_nothing_along_what_rounding_leaves_of_no_prompt(dtype: torch.dtype) -> None:
    """Where the prompt is the empty text, Z+ - Z0 is a direction all the same."""
    positive, negative, noise = drawn(7, 7, 7)
    positive, negative, nearly = (part.to(dtype) for part in (positive, negative, positive + 1e-7 * noise))
    told = {"scale": 10.0, "weight": 2.0, "tau": 2.5, "alpha": 0.25}
    found, expected = (perp(positive, negative, nearly, keep=keep, **told).double() for keep in (3.0, 0.0))
    assert float((found - expected).square().mean()) < 0.05**2 * float(expected.square().mean())


# -- nothing at all ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "steering", [Steering("nasa", 0), Steering("nag", 1.0), Steering("nag", 1, tau=1, alpha=1), Steering("perp", 1)]
)
def test_neutral_steering_changes_no_bit(steering: Steering, dtype: torch.dtype) -> None:
    """Whatever the token's norm: also 0, and numbers near the ends of the range."""
    positive, *others = drawn(200, 200, 200, dtype=dtype)
    positive *= torch.logspace(-30, 4, 200, dtype=torch.float64).to(dtype)[:, None]
    positive[:, :, 3] = 0
    steering = steering.of_family("unet")
    assert torch.equal(steering.apart(positive, *others[: 1 + tail(steering)]), positive)


def test_only_what_changes_nothing_is_neutral() -> None:
    neutral = [Steering("nasa", 0), Steering("nag", 1), Steering("nag", 5, alpha=0), Steering("perp", 1)]
    assert [found.neutral for found in neutral] == [True] * 4
    active = [Steering("nasa", 1), Steering("nasa", 0.3, alpha=0), *CASES.values()]
    assert [found for found in active if found.neutral] == []
    positive, negative = drawn(7, 7)
    assert torch.equal(neutral[2].of_family("flux").apart(positive, negative), positive)


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_a_strong_push_stays_finite_in_half_precision() -> None:
    """100 Z+ alone would be beyond float16; what comes out is limited to tau |Z+|."""
    positive, negative = (900 * part for part in drawn(9, 9, dtype=torch.float16))
    found = nag(positive, negative, 100.0, tau=2.5, alpha=0.25)
    expected = nag_by_hand(*numpied(positive, negative), 100.0, 2.5, 0.25, 1)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0.01, atol=5)
    assert perp(positive, negative, -positive, 100.0, 100.0, 100.0, tau=2.5, alpha=0.25).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "steering",
    [CASES["nasa"], Steering("nag", 5.0, 2.5, 0.25, 1), CASES["vsf"], Steering("perp", 5.0, 2.5, 0.25, 1, keep=1)],
    ids=["nasa", "nag", "vsf", "perp"],
)
def test_half_precision_is_as_good_as_that_of_plain_attention(steering: Steering, dtype: torch.dtype) -> None:
    """Rounding errors of Z+ and Z- enter by their factors; nothing beyond twice that is added."""
    q, k, v = streams((40, 30, 200), width=32, dtype=dtype)
    exact = [Streams(*(part.double() for part in stream)) for stream in (q, k, v)]

    def error(found: Tensor, expected: Tensor) -> float:
        return float((found.double() - expected).square().mean().sqrt())

    keys, values = (torch.cat([part.positive, part.image], 2) for part in (k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    plain = error(sdpa(q.image, keys, values), sdpa(q.image.double(), keys.double(), values.double()))
    found, expected = (steering.joint(*parts, empty=10 * tail(steering)) for parts in ((q, k, v), exact))
    perp_of = 0.25 * (5 + 4 * (1 + 1.5 * (2 + 3))) + 0.75  # Z+, Z0, and the weighed b' of b and three times a
    factor = {"nasa": 1 + 0.3, "nag": 0.25 * (5 + 4) + 0.75, "vsf": 2.0, "perp": perp_of}[steering.mode]
    assert error(found.image, expected.image) < 2 * factor * plain
    assert error(found.positive, expected.positive) < 2 * plain and error(found.negative, expected.negative) < 2 * plain


@pytest.mark.parametrize("name", ["nasa", "nag", "nag, Euclidean", "vsf", "perp"])
def test_gradients_match_finite_differences(name: str) -> None:
    """Backward and in forward mode, of everything that goes in."""
    steering = CASES[name]
    shape = {"batch": 1, "heads": 2, "width": 2}
    cross = [part.requires_grad_(True) for part in drawn(3, 2, 2, 2, 2, **shape)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, *negative: steering.cross(q, k, v, negative, None, tail(steering)), cross, check_forward_ad=True
    )
    joint = [part.requires_grad_(True) for stream in streams((2, 2, 2), **shape) for part in stream]
    assert torch.autograd.gradcheck(
        lambda *parts: tuple(steering.joint(*(Streams(*parts[at : at + 3]) for at in (0, 3, 6)), empty=tail(steering))),
        joint,
        check_forward_ad=True,
    )


@pytest.mark.parametrize("order", [1, 2])
def test_a_token_of_zeros_has_finite_gradients(order: int) -> None:
    for zeros in ((0,), (1,), (0, 1)):
        pair = [part.requires_grad_(True) for part in (torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))]
        with torch.no_grad():
            for which in zeros:
                pair[which][:, :, 1] = 0
        found = nag(*pair, 3.0, 1.5, 0.5, order)
        assert found.isfinite().all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(found.sum(), pair))


@pytest.mark.parametrize("name", narrowed(["nasa", "nag", "vsf", "perp"], "nag", "vsf"))
def test_a_compiled_network_gives_the_same(name: str) -> None:
    """In one graph, with the fused kernels in it, also where nothing was tried before."""
    steering = CASES[name]
    torch.compiler.reset()
    partial._tried.cache_clear()
    q, k, v = streams(dtype=torch.float32)
    rows = torch.tensor([True, False])
    with torch.no_grad():
        told = (q, k, v, rows, tail(steering))
        found = torch.compile(steering.joint, backend="aot_eager", fullgraph=True)(*told)
        assert partial._choice(rows.device, torch.float32, 4) == "flash on the cpu"
        for ours, theirs in zip(found, steering.joint(*told), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


# -- wrong equations --------------------------------------------------------------------------------------------------

EQUATIONS = {
    "NASA adds": ("alpha=-scale)", "alpha=scale)"),
    "s in place of s - 1": ("(scale - 1) / scale", "scale / scale"),
    "s - 1 undivided": ("(scale - 1) / scale", "(scale - 1)"),
    "the ratio upside down": ("_norm(positive, order) / _norm(g, order)", "_norm(g, order) / _norm(positive, order)"),
    "max in place of min": ("clamp_max(scale)", "clamp_min(scale)"),
    "never longer": ("clamp_max(scale)", "clamp_max(1)"),
    "no limit": ("g * reach.to(g.dtype)", "g * scale"),
    "no tau": ("(tau * _norm", "(_norm"),
    "the blend turned": ("positive, g * reach.to(g.dtype), alpha", "g * reach.to(g.dtype), positive, alpha"),
    "no blend": ("g.dtype), alpha)", "g.dtype), 1.0)"),
    "a norm a head": ("dim=(1, 3)", "dim=3"),
    "one norm for all tokens": ("dim=(1, 3)", "dim=(1, 2, 3)"),
    "one norm for all pictures": ("dim=(1, 3)", "dim=(0, 1, 3)"),
    "another order": ("(z, order,", "(z, 3 - order,"),
    "the offset added": ("shifted(-offset)", "shifted(offset)"),
    "the values not flipped": ("scaled(-scale)", "scaled(scale)"),
    "Perp's negative not weighed": ("a - weight * b", "a - b"),
    "Perp's prompt weighed": ("a - weight * b", "weight * (a - b)"),
    "nothing spared": ("b = b - keep", "b = b - 0 * keep"),
    "spared the wrong way": ("b = b - keep", "b = b + keep"),
    "spared over all heads": ("(a * b).sum(3,", "(a * b).sum((1, 3),"),
    "what is spared lies along the negative": ("least * z) * a", "least * z) * b"),
    "from nothing in place of the empty text": (
        "a, b = z - zero, other - zero",
        "a, b = z, other",
    ),
}
JOINS = {
    "no picture beside the negative": ("merge(to_image, found)", "found.out"),
    "the positive for the negative": ("merge(to_image, found)", "merge(to_image, to_positive)"),
    "no picture beside the positive": ("plain = to_image.joined(to_positive)", "plain = to_positive"),
    "the flipped text for the picture's": ("vsf(plain, away_alone", "vsf(plain, to_positive"),
    "a text that sees itself alone": ("[merge(*parts)", "[parts[1].out"),
    "a text that sees the picture alone": ("merge(of_positive, own_positive)", "of_positive.out"),
    "what is found beside the text is lost": ("steered + (found - plain.out)", "steered"),
    "the others steered": (", steered, plain.out)", ", plain.out, steered)"),
    "the texts' keys exchanged": ("k.positive, v.positive", "k.negative, v.negative"),
}


def check_all(module: ModuleType) -> None:
    for steering in CASES.values():
        check_cross(module, steering)
        check_joint(module, steering)
        check_joint(module, steering, torch.tensor([True, False]))


def mutated(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """core.guidance with a change of its own source, or of the equations that it has from the kernels."""
    if change[0] in inspect.getsource(guidance):
        return mutant("onestep.core.guidance", *change, monkeypatch)
    equations = mutant("onestep.kernels.steering", *change, monkeypatch)
    for module, name in itertools.product((guidance, steered), ("nasa", "nag", "limited")):
        monkeypatch.setattr(module, name, getattr(equations, name), raising=False)
    return guidance


@pytest.mark.parametrize("change", [("Z = Z+ - a Z-", "Z = Z+ + (-a) Z-"), ("a = Z+ - Z0,", "a = Z+ + (-Z0),")])
def test_a_copy_without_a_mistake_passes(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    check_all(mutated(change, monkeypatch))


@pytest.mark.parametrize("change", [*EQUATIONS.values(), *JOINS.values()], ids=[*EQUATIONS, *JOINS])
def test_a_wrong_equation_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    must_fail(check_all, mutated(change, monkeypatch))


def test_texts_exchanged_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    change = (
        "attention(q, k, v) if found is None else found, *away",
        "*away, attention(q, k, v) if found is None else found",
    )
    module = mutant("onestep.core.guidance", *change, monkeypatch)
    for name in ("nasa", "nag"):
        must_fail(lambda mutated, name=name: check_cross(mutated, CASES[name]), module)
