"""Negative adapters: silent at first and where they are told nothing, then what the equation says."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from cross_blocks import cross_blocks
from mutations import must_fail, mutant
from narrowed import narrowed
from small_networks import CASES, inputs_of, network_of, random_state
from torch import Tensor, nn

from onestep.core import negative_adapter as module
from onestep.core.adapter_file import check_adapter, load_adapter, save_adapter
from onestep.core.adapter_module import Call
from onestep.core.checkpoint import checkpoint_blocks
from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.families import bind_diffusers
from onestep.core.negative_adapter import (
    MAKERS,
    NegativeAttention,
    check_base,
    check_negative,
    checked_scale,
    heads_of,
    new_adapter,
)
from onestep.core.roles import Roles

UNETS = ["sd15", "sdxl"]
Array = np.ndarray[Any, np.dtype[np.float64]]


def scattered(side: NegativeAttention, seed: int = 4, dtype: torch.dtype = torch.float64) -> NegativeAttention:
    """Away from its start: alpha and beta are not zero."""
    draw = torch.Generator().manual_seed(seed)
    side.to(dtype)
    for _, value in sorted(side.named_parameters()):
        value.detach().add_(0.3 * torch.randn(value.shape, generator=draw, dtype=torch.float64).to(dtype))
    return side


def made(network: nn.Module, targets: Any, seed: int = 0, role: Any = None) -> NegativeAttention:
    return new_adapter(targets, "unet", heads_of([network], targets), seed, role)


def on(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Roles, Any]:
    """A published network with a new adapter under the role "student", and its inputs."""
    network = network_of(name, dtype)
    roles = Roles(bind_diffusers(network))
    roles.add_module("student", made(network, roles.targets))
    return network, roles, inputs_of(name, dtype)


def drawn(name: str, network: Any, roles: Roles, inputs: Any, **told: Any) -> Tensor:
    with roles.use("student", **told), roles.capture(2, inputs["time"], Cond(inputs["text"])):
        return CASES[name].run(network, inputs)


def texts(length: int = 7, count: int = 2, dtype: torch.dtype = torch.float64, seed: int = 6) -> Cond:
    draw = torch.Generator().manual_seed(seed)
    return Cond(torch.randn(count, length, 24, generator=draw, dtype=torch.float64).to(dtype))


# -- silence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", narrowed(UNETS, "sd15"))
def test_a_new_adapter_is_none_to_the_bit(name: str, dtype: torch.dtype) -> None:
    network, roles, inputs = on(name, dtype)
    with torch.no_grad():
        plain = CASES[name].run(network, inputs)
        with roles.installed():
            for told in ({}, {"negative": None}, {"negative": texts(dtype=dtype)}, {"negative": texts(), "scale": 3.0}):
                found = drawn(name, network, roles, inputs, **told)
                assert found.dtype == dtype and torch.equal(found, plain)


@pytest.mark.parametrize("name", UNETS)
def test_a_trained_one_acts_on_the_rows_it_is_told_alone(name: str) -> None:
    network, roles, inputs = on(name)
    scattered(roles.modules["student"])
    with torch.no_grad(), roles.installed():
        plain = CASES[name].run(network, inputs)
        assert torch.equal(drawn(name, network, roles, inputs), plain)
        assert torch.equal(drawn(name, network, roles, inputs, negative=texts(), scale=0.0), plain)
        both = drawn(name, network, roles, inputs, negative=texts())
        assert float((both - plain).abs().amax((1, 2, 3)).min()) > 1e-3
        first = drawn(name, network, roles, inputs, negative=texts(), scale=torch.tensor([1.0, 0.0]))
        torch.testing.assert_close(first[0], both[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(first[1], plain[1], rtol=1e-9, atol=1e-9)
        # one text for all is the same as that text for each; a row knows nothing of its neighbour's
        one = drawn(name, network, roles, inputs, negative=texts(count=1))
        each = drawn(name, network, roles, inputs, negative=texts(count=1).repeat(2))
        torch.testing.assert_close(one, each, rtol=1e-9, atol=1e-9)
        other = drawn(name, network, roles, inputs, negative=Cond(torch.cat([texts().text[:1], texts().text[:1] * 3])))
        torch.testing.assert_close(other[0], both[0], rtol=1e-9, atol=1e-9)


# -- the equation -----------------------------------------------------------------------------------------------------


class Cross(nn.Module):
    """A U-Net's cross-attention of two heads, by its names: [B, N, 4] and a text [B, L, 5]."""

    heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(4, 6), nn.Linear(5, 6, bias=False), nn.Linear(5, 6, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(6, 4)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        weights = (self.to_q(x) @ self.to_k(text).mT).softmax(-1)
        return x + self.to_out[0](weights @ self.to_v(text))


def cross(seed: int = 0) -> tuple[nn.ModuleList, Roles]:
    return cross_blocks(Cross, seed)


def seen(mask: bool) -> tuple[Tensor, Tensor, Cond]:
    """What to_out.0 takes, what to_q gives, and a negative of three tokens."""
    draw = torch.Generator().manual_seed(1)
    positive, q, text = (torch.randn(2, n, c, generator=draw, dtype=torch.float64) for n, c in ((7, 6), (7, 6), (3, 5)))
    real = torch.tensor([[True, True, True], [True, False, False]]) if mask else None
    return positive, q, Cond(text, real)


def found_in_numpy(q: Array, k: Array, v: Array, mask: Array | None, heads: int) -> Array:
    """softmax(q k^T / sqrt(d)) v, head by head."""
    parts, width = [], q.shape[-1] // heads
    for head in range(heads):
        at = slice(head * width, (head + 1) * width)
        scores = np.einsum("bnd,bld->bnl", q[..., at], k[..., at]) / np.sqrt(width)
        if mask is not None:
            scores = np.where(mask[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        parts.append(np.einsum("bnl,bld->bnd", weights / weights.sum(-1, keepdims=True), v[..., at]))
    return np.concatenate(parts, -1)


def check_equation(found: ModuleType, mask: bool = True) -> None:
    blocks, roles = cross()
    side = found.new_adapter(roles.targets, "unet", found.heads_of(blocks, roles.targets), 3)
    side = scattered(side)
    positive, q, negative = seen(mask)
    scale = torch.tensor([1.7, 0.4], dtype=torch.float64)
    call = Call(torch.zeros(2), negative, {"negative": negative, "scale": scale})
    assert side.on_output("mid.1.attn2.to_q", positive, q, call) is q
    given = side.on_input("mid.1.attn2.to_out.0", positive, call).detach().numpy()
    state = {name: value.detach().numpy() for name, value in side.state_dict().items()}
    n, z = negative.text.numpy(), positive.numpy()
    k, v = n @ state["to_k_neg.1.weight"].T, n @ state["to_v_neg.1.weight"].T
    away = found_in_numpy(q.numpy(), k, v, None if negative.mask is None else negative.mask.numpy(), 2)
    reach = np.sqrt((z**2).sum(-1, keepdims=True) / (away**2).sum(-1, keepdims=True))
    wanted = z - scale.numpy()[:, None, None] * (state["alpha.1"] * reach * away + state["beta.1"])
    np.testing.assert_allclose(given, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask", [False, True])
def test_the_equation_in_numpy(mask: bool) -> None:
    check_equation(module, mask)


MUTANTS = {
    "towards": ("return positive - scale", "return positive + scale"),
    "no dial for beta": ("scale * (alpha * (reach * negative) + beta)", "scale * alpha * (reach * negative) - beta"),
    "the norms the other way": ("_norm(positive) / _norm(negative)", "_norm(negative) / _norm(positive)"),
    "the whole batch's norm": (
        "linalg.vector_norm(x, dim=-1, keepdim=True",
        "linalg.vector_norm(x, dim=(0, 1, 2), keepdim=True",
    ),
    "one head": ("unflatten(-1, (heads, -1))", "unflatten(-1, (1, -1))"),
    "padding is looked at": ("negative.mask[:, None, None]", "(negative.mask | True)[:, None, None]"),
    "values for keys": ("[self.to_k_neg[at].weight, self.to_v_neg", "[self.to_v_neg[at].weight, self.to_v_neg"),
    "the first attention's": ("at, q = self.at[site]", "at, q = 0 * self.at[site]"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_adapter_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    must_fail(check_equation, mutant("onestep.core.negative_adapter", *change, monkeypatch))


def test_at_its_start_it_finds_what_the_student_finds_in_the_negative() -> None:
    """Keys and values are the base's with the role's factors, so Z- is NASA's."""
    network = network_of("sd15", torch.float32)
    targets = {target.name: target for target in bind_diffusers(network)}
    state = random_state(targets.values())
    side = made(network, targets, role=state)
    for at, (name, _, heads) in enumerate(side.config.sites):
        for layers, part in ((side.to_k_neg, "to_k"), (side.to_v_neg, "to_v")):
            a, b = state[f"{name}.{part}"]
            wanted = targets[f"{name}.{part}"].module.weight + b @ a
            torch.testing.assert_close(layers[at].weight, wanted)
        assert heads == network.get_submodule(name).heads and heads > 1


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_finite_differences(checkpointing: bool) -> None:
    """float64, every parameter along one random direction; recomputed blocks too, one of them after another call."""
    blocks, roles = cross()
    roles.add_module("student", scattered(made(blocks, roles.targets)))
    draw = torch.Generator().manual_seed(9)
    x, text = (torch.randn(2, n, c, generator=draw, dtype=torch.float64) for n, c in ((6, 4), (3, 5)))
    parameters = roles.parameters("student")

    def loss(factor: float = 1.0) -> Tensor:
        negative = Cond(text.flip(0) * factor)
        with roles.use("student", negative=negative), roles.capture(2, torch.zeros(2), Cond(text)):
            out = x
            for block in blocks:
                out = block(out, text)
        return (out * torch.arange(1, 5)).sum()

    with roles.installed(), checkpoint_blocks(blocks if checkpointing else [], roles):
        value = loss()
        with torch.no_grad():
            loss(2.0)
        value.backward()
    assert len(parameters) == 8
    with torch.no_grad(), roles.installed():
        for parameter in parameters:
            assert parameter.grad is not None
            along = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            ends = []
            for step in (1e-5, -2e-5):
                parameter.add_(step * along)
                ends.append(float(loss()))
            parameter.add_(1e-5 * along)
            slope = (ends[0] - ends[1]) / 2e-5
            assert float((parameter.grad * along).sum()) == pytest.approx(slope, rel=2e-5, abs=1e-7)


# -- files, bases, bad input ------------------------------------------------------------------------------------------


def test_a_file_gives_back_the_adapter(tmp_path: Path) -> None:
    network, roles, inputs = on("sdxl", torch.float32)
    side = scattered(roles.modules["student"], dtype=torch.float32)
    save_adapter(tmp_path / "x.safetensors", side, "unet")
    assert "bit for bit" in check_adapter(tmp_path / "x.safetensors", side, "unet")
    before = torch.get_rng_state()
    read = load_adapter(tmp_path / "x.safetensors", MAKERS, "unet").module
    assert torch.equal(torch.get_rng_state(), before)
    check_base(read, roles.targets, "unet")
    with torch.no_grad(), roles.installed():
        wanted = drawn("sdxl", network, roles, inputs, negative=texts(dtype=torch.float32))
        roles.add_module("student", read)
        assert torch.equal(drawn("sdxl", network, roles, inputs, negative=texts(dtype=torch.float32)), wanted)


@pytest.mark.parametrize(
    "config",
    [
        {"sites": [], "text": 8},
        {"sites": [["a", 8, 3]], "text": 8},
        {"sites": [["a", 8, 0]], "text": 8},
        {"sites": [["a", 8]], "text": 8},
        {"sites": [["a", 2**17, 2]], "text": 8},
        {"sites": [["a", 8, 2]], "text": 0},
        {"sites": [["a", 8, 2]], "text": 8, "more": 1},
    ],
)
def test_a_header_that_makes_no_adapter(config: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        NegativeAttention.from_config(**config)


def test_another_base_a_joint_one_and_values_out_of_range_are_refused() -> None:
    _, roles, _ = on("sd15")
    side = roles.modules["student"]
    for name in ("sdxl", "sd3", "flux", "anima"):
        targets = {target.name: target for target in bind_diffusers(network_of(name))}
        with pytest.raises(OneStepError, match="this adapter is for another base: it needs"):
            check_base(side, targets, CASES[name].family)
        if CASES[name].family != "unet":
            with pytest.raises(OneStepError, match="acts on a U-Net's cross-attentions, of which this"):
                new_adapter(targets, CASES[name].family, {}, 0)
    with pytest.raises(OneStepError, match="tokens are 25 wide, this adapter reads 24"):
        check_negative(side, 25)
    for value in (float("nan"), -0.1, 11, "2", None):
        with pytest.raises(OneStepError, match="scale is .*must lie in 0"):
            checked_scale(value)
    assert checked_scale(2) == 2.0
