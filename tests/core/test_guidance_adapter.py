"""Guidance adapters: silent at first and where they are told nothing, then what the equation says."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from cross_blocks import cross_blocks
from diffusers import UNet2DConditionModel
from mutations import must_fail, mutant
from narrowed import narrowed
from small_networks import CASES, inputs_of, network_of, wan
from torch import Tensor, nn

from onestep.core import guidance_adapter as module
from onestep.core.adapter_file import check_adapter, load_adapter, save_adapter
from onestep.core.adapter_module import Call
from onestep.core.checkpoint import checkpoint_blocks
from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES, bind_diffusers, select
from onestep.core.guidance_adapter import MAKERS, check_base, new_adapter, with_guidance
from onestep.core.roles import Roles

W = torch.tensor([3.5, 7.25], dtype=torch.float64)
GUIDED = [n for n, case in CASES.items() if FAMILIES[case.family].cross_attention or FAMILIES[case.family].summary]
Array = np.ndarray[Any, np.dtype[np.float64]]


def scattered(side: Any, seed: int = 4) -> Any:
    """Away from its start, in float64: output layers are not zero."""
    draw = torch.Generator().manual_seed(seed)
    side.double()
    for _, value in sorted(side.named_parameters()):
        value.detach().add_(0.3 * torch.randn(value.shape, generator=draw, dtype=torch.float64))
    return side


def on(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Roles, Any, Cond]:
    """A published network with a new adapter under the role "student", its inputs, and their conditions."""
    network, case = network_of(name, dtype), CASES[name]
    roles = Roles(bind_diffusers(network))
    roles.add_module("student", new_adapter(roles.targets, case.family, 0))
    inputs = inputs_of(name, dtype)
    return network, roles, inputs, Cond(inputs["text"], pooled=inputs.get("pooled"))


def drawn(name: str, network: Any, roles: Roles, inputs: Any, cond: Cond, w: Tensor | None) -> Tensor:
    scale = FAMILIES[CASES[name].family].divided
    with roles.use("student"), roles.capture(2, inputs["time"] * scale, cond.with_(guidance=w)):
        return CASES[name].run(network, inputs)


# -- silence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", narrowed(GUIDED, "sd15", "flux", "flux2", "z_image"))
def test_a_new_adapter_is_none_to_the_bit(name: str, dtype: torch.dtype) -> None:
    network, roles, inputs, cond = on(name, dtype)
    with torch.no_grad():
        plain = CASES[name].run(network, inputs)
        with roles.installed():
            for w in (W, None):
                found = drawn(name, network, roles, inputs, cond, w)
                assert found.dtype == dtype and torch.equal(found, plain)


@pytest.mark.parametrize("name", narrowed(GUIDED, "sd15", "flux", "flux2", "z_image"))
def test_a_trained_one_is_silent_at_one_and_where_it_is_told_nothing(name: str) -> None:
    network, roles, inputs, cond = on(name)
    scattered(roles.modules["student"])
    with torch.no_grad(), roles.installed():
        plain = CASES[name].run(network, inputs)
        assert torch.equal(drawn(name, network, roles, inputs, cond, None), plain)
        assert torch.equal(drawn(name, network, roles, inputs, cond, torch.ones(2)), plain)
        changed = drawn(name, network, roles, inputs, cond, W)
        assert float((changed - plain).abs().max()) > 1e-3
        # rows are told apart: with the first row's scale alone the first row is the same, the second is not
        alike = drawn(name, network, roles, inputs, cond, W[:1].expand(2))
        torch.testing.assert_close(alike[0], changed[0], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(alike[1], changed[1])


# -- the equation -----------------------------------------------------------------------------------------------------


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def mlp(state: dict[str, Array], name: str, x: Array) -> Array:
    for number in (0, 2):
        x = x @ state[f"{name}.{number}.weight"].T + state[f"{name}.{number}.bias"]
        x = silu(x) if number == 0 else x
    return x


def told(state: dict[str, Array], w: Array, time: Array) -> tuple[Array, Array]:
    """The guidance's and the time's vectors, from random Fourier features and sinusoids."""
    waves = np.cos(2 * np.pi * (np.outer(w, state["conditioning.frequencies"]) + state["conditioning.phases"]))
    g = mlp(state, "conditioning.guidance", waves)
    g = (g - g.mean(1, keepdims=True)) / np.sqrt(g.var(1, keepdims=True) + 1e-5)
    g = g * state["conditioning.norm.weight"] + state["conditioning.norm.bias"]
    angles = np.outer(time, 10_000.0 ** (-np.arange(32) / 32))
    return g, mlp(state, "conditioning.time", np.concatenate([np.sin(angles), np.cos(angles)], 1))


def numpy_state(side: Any) -> dict[str, Array]:
    return {name: value.detach().double().numpy() for name, value in side.state_dict().items()}


class Cross(nn.Module):
    """A U-Net's cross-attention, by its names: [B, N, 4] and a text [B, L, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(4, 4), nn.Linear(5, 4), nn.Linear(5, 4)
        self.to_out = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        weights = (self.to_q(x) @ self.to_k(text).mT).softmax(-1)
        return x + self.to_out[0](weights @ self.to_v(text))


def cross(seed: int = 0) -> tuple[nn.ModuleList, Roles]:
    return cross_blocks(Cross, seed)


def seen(seed: int = 1, mask: bool = False) -> tuple[Tensor, Cond, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x, text = (torch.randn(2, n, c, generator=draw, dtype=torch.float64) for n, c in ((6, 4), (3, 5)))
    real = torch.tensor([[True, True, True], [True, False, False]]) if mask else None
    return x, Cond(text, real, guidance=W), torch.tensor([801.0, 37.0], dtype=torch.float64)


def many_heads(q: Array, k: Array, v: Array, lengths: Any, heads: int = 4) -> Array:
    """softmax(q k^T / sqrt(d)) v head by head, row b over its first ``lengths[b]`` keys."""
    out, width = np.zeros_like(q), q.shape[-1] // heads
    for row, head in itertools.product(range(len(q)), range(heads)):
        at = slice(head * width, (head + 1) * width)
        scores = q[row, :, at] @ k[row, : lengths[row], at].T / math.sqrt(width)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[row, :, at] = weights / weights.sum(-1, keepdims=True) @ v[row, : lengths[row], at]
    return out


def check_attention(found: ModuleType, mask: bool) -> None:
    blocks, roles = cross()
    side = scattered(found.new_adapter(roles.targets, "unet", 3, share=1.0))
    x, cond, time = seen(mask=mask)
    output = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    call = Call(time, cond)
    assert side.on_input("mid.1.attn2.to_q", x, call) is x
    first = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    given = side.on_output("mid.1.attn2.to_out.0", first, output, call)
    state, h = numpy_state(side), x.numpy()
    g, t = (vector[:, None] for vector in told(state, W.numpy(), time.numpy()))
    text = cond.text.numpy() @ state["conditioning.text.weight"].T + state["conditioning.text.bias"]
    text = text + silu(text + g + t) @ state["mix.weight"].T + state["mix.bias"]
    tokens = np.concatenate([g, t, text], 1)
    q, k, v = (at @ state[f"{name}.1.weight"].T for at, name in ((h, "queries"), (tokens, "keys"), (tokens, "values")))
    z = many_heads(q, k, v, np.array([3, 1]) + 2 if mask else np.array([5, 5]))
    z += q + first.numpy() @ state["found.1.weight"].T + (g + t) @ state["shift.1.weight"].T + state["shift.1.bias"]
    added = (W.numpy() - 1)[:, None, None] * (silu(z) @ state["out.1.weight"].T + state["out.1.bias"])
    np.testing.assert_allclose(given.detach().numpy(), output.numpy() + added, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask", [False, True])
def test_the_attention_form_in_numpy(mask: bool) -> None:
    check_attention(module, mask)


SITES = {
    "sd3": ["transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.attn.to_out.0"],
    "flux": ["transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.0.proj_out"],
    "flux2": ["transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.0.attn.to_out"],
    "chroma": ["transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.0.proj_out"],
    "qwen_image": [f"transformer_blocks.{n}.attn.to_out.0" for n in (0, 1)],
    "krea2": [f"transformer_blocks.{n}.attn.to_out.0" for n in (0, 1)],
    "z_image": ["layers.0.attention.to_out.0", "layers.1.attention.to_out.0"],
}


def told_text(family: str) -> tuple[Cond, Array]:
    """A condition, and what the adapter makes of its text: the pooled one, or the mean of the real tokens, each brought
    to a root mean square of 1."""
    if FAMILIES[family].pooled:
        pooled = inputs_of(family)["pooled"]
        return Cond(torch.zeros(2, 5, 24), pooled=pooled, guidance=W), pooled.numpy()
    text = inputs_of(family)["text"] * torch.tensor([1000.0, 1, 1, 1, 1])[:, None]
    cond = Cond(text, torch.arange(5) < torch.tensor([[5], [3]]), guidance=W)
    tokens = text.numpy() / np.sqrt((text.numpy() ** 2).mean(2, keepdims=True))
    return cond, np.stack([tokens[0].mean(0), tokens[1, :3].mean(0)])


def check_offset(found: ModuleType, family: str) -> None:
    """A picture's tokens get one vector each, in Z-Image the text's too; Flux' single blocks hold the text's first."""
    network, names = network_of(family), SITES[family]
    targets = {target.name: target for target in bind_diffusers(network)}
    side = scattered(found.new_adapter(targets, family, 3, share=0.5))
    width = targets[names[0]].out_rows
    (cond, summary), state = told_text(family), numpy_state(side)
    time = torch.tensor([750.0, 125.0], dtype=torch.float64)
    output = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    call = Call(time, cond)
    for number, name in enumerate(names):
        single = name.startswith("single")
        here = output[:, 5:] if names[-1].startswith("single") and not single else output
        given = side.on_output(name, here, here, call).detach().numpy() - here.numpy()
        g, t = told(state, W.numpy(), time.numpy())
        c = g + t + summary @ state["conditioning.text.weight"].T + state["conditioning.text.bias"]
        number = [site for site, _ in side.config.sites].index(name)
        c = silu(silu(c) @ state["mix.1.weight"].T + state["mix.1.bias"])
        c = (W.numpy() - 1)[:, None] * (c @ state[f"out.{number}.weight"].T + state[f"out.{number}.bias"])
        wanted = np.repeat(c[:, None], here.shape[1], 1)
        wanted[:, : 5 if single else 0] = 0
        np.testing.assert_allclose(given, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", SITES)
def test_the_offset_form_in_numpy(family: str) -> None:
    check_offset(module, family)


MUTANTS = {
    "guidance from nought": ("call.cond.guidance.to(like.device) - 1)", "call.cond.guidance.to(like.device))"),
    "no phase": ("* self.frequencies + self.phases", "* self.frequencies"),
    "sines for cosines": ("self.norm(self.guidance(torch.cos(", "self.norm(self.guidance(torch.sin("),
    "times too slow": ("-math.log(10_000) / half", "-math.log(10_000) / FEATURES"),
    "padding is looked at": ("F.pad(cond.mask, (2, 0), value=True)", "F.pad(cond.mask | True, (2, 0), value=True)"),
    "the output for the query": ("h, at = call.cache.pop(look)", "h, at = output"),
    "one head": ("x.unflatten(2, (HEADS, -1))", "x.unflatten(2, (1, -1))"),
    "blind to the place": ("looked + q +", "looked +"),
    "blind to the first attention": ("_linear(self.found[at], x)", "_linear(self.found[at], output)"),
    "not told": ("c, text = scale + moment,", "c, text = moment,"),
    "guidance apart from the text": ("F.silu(text + c)", "F.silu(text)"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_adapter_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    must_fail(lambda found: check_attention(found, True), mutant("onestep.core.guidance_adapter", *change, monkeypatch))


@pytest.mark.parametrize(
    "change",
    [
        ("(0, 0, words, 0)", "(0, 0, 0, words)"),
        (
            "nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())",
            "nn.Sequential(nn.Identity(), nn.Linear(hidden, hidden), nn.SiLU())",
        ),
    ],
)
def test_a_wrong_offset_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    must_fail(lambda found: check_offset(found, "flux"), mutant("onestep.core.guidance_adapter", *change, monkeypatch))


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_finite_differences(checkpointing: bool) -> None:
    """float64, every parameter along one random direction; recomputed blocks too, one of them after another call."""
    blocks, roles = cross()
    roles.add_module("student", scattered(new_adapter(roles.targets, "unet", 0, share=1.0)))
    x, cond, time = seen(mask=True)
    parameters = roles.parameters("student")

    def loss(w: Tensor | None = W) -> Tensor:
        with roles.use("student"), roles.capture(2, time, cond.with_(guidance=w)):
            out = x
            for block in blocks:
                out = block(out, cond.text)
        return (out * torch.arange(1, 5)).sum()

    with roles.installed(), checkpoint_blocks(blocks if checkpointing else [], roles):
        value = loss()
        with torch.no_grad():
            loss(2 * W)
        value.backward()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad(), roles.installed():
        for parameter in parameters:
            assert parameter.grad is not None
            along = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            ends = []
            for step in (1e-5, -2e-5):
                parameter.add_(step * along)
                ends.append(float(loss()))
            parameter.add_(1e-5 * along)
            assert float((parameter.grad * along).sum()) == pytest.approx(
                (ends[0] - ends[1]) / 2e-5, rel=2e-5, abs=1e-7
            )


# -- initial values, size, files, bases -------------------------------------------------------------------------------


def test_initial_values_are_the_seeds_alone() -> None:
    _, roles = cross()
    before = torch.get_rng_state()
    torch.manual_seed(77)
    first = new_adapter(roles.targets, "unet", 5)
    second = new_adapter(dict(reversed(roles.targets.items())), "unet", 5)
    torch.manual_seed(77)
    assert torch.equal(torch.rand(3), (torch.manual_seed(77), torch.rand(3))[1])
    torch.set_rng_state(before)
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    other = new_adapter(roles.targets, "unet", 6).state_dict()
    same = {name for name, value in first.state_dict().items() if torch.equal(value, other[name])}
    assert same == {name for name in other if name.startswith("out.") or name.endswith("bias") or "norm" in name}


@pytest.mark.broad
def test_about_two_per_cent_of_sd15() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    targets = {target.name: target for target in bind_diffusers(unet)}
    side = new_adapter(targets, "unet", 0)
    share = sum(p.numel() for p in side.parameters()) / sum(p.numel() for p in unet.parameters())
    assert len(side.config.sites) == 16 and side.config.text == 768
    assert 0.019 < share < 0.021, (share, side.config.hidden)


@pytest.mark.parametrize("name", ["sd15", "sd35", "flux", "flux2", "z_image"])
def test_a_file_gives_back_the_adapter(name: str, tmp_path: Path) -> None:
    network, roles, inputs, cond = on(name, torch.float32)
    side, family = scattered(roles.modules["student"]).float(), CASES[name].family
    save_adapter(tmp_path / "x.safetensors", side, family)
    assert "bit for bit" in check_adapter(tmp_path / "x.safetensors", side, family)
    read = load_adapter(tmp_path / "x.safetensors", MAKERS, family).module
    check_base(read, roles.targets, family)
    with torch.no_grad(), roles.installed():
        wanted = drawn(name, network, roles, inputs, cond, W)
        roles.add_module("student", read)
        assert torch.equal(drawn(name, network, roles, inputs, cond, W), wanted)


def test_another_base_is_refused() -> None:
    _, roles, *_ = on("sd15")
    for name in ("sdxl", "sd3", "flux", "flux2", "z_image"):
        network, case = network_of(name), CASES[name]
        targets = {target.name: target for target in bind_diffusers(network)}
        with pytest.raises(OneStepError, match="this adapter is for another base: it needs 6 layers") as caught:
            check_base(roles.modules["student"], targets, case.family)
        assert len(str(caught.value)) < 400
    with pytest.raises(OneStepError, match="none of the layers"):
        new_adapter({}, "unet", 0)


def test_every_row_is_told_the_scale() -> None:
    cond = with_guidance(Cond(torch.zeros(3, 2, 4)), 2.5)
    assert cond.guidance is not None and cond.guidance.tolist() == [2.5] * 3


def test_a_family_that_reads_no_text_as_one_vector_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "flux2", replace(FAMILIES["flux2"], summary=""))
    targets = {target.name: target for target in bind_diffusers(network_of("flux2"))}
    with pytest.raises(OneStepError, match="FLUX.2 models cannot have a guidance adapter yet"):
        new_adapter(targets, "flux2", 0)


@pytest.mark.parametrize("name", ["wan", "pixart"])
def test_texts_that_the_network_embeds_first_are_read_as_they_come(name: str) -> None:
    """Its cross-attention reads tokens of another width."""
    network = wan(num_attention_heads=4).double() if name == "wan" else network_of(name)
    roles, inputs = Roles(bind_diffusers(network)), inputs_of(name)
    side = scattered(new_adapter(roles.targets, name, 0))
    keys = next(target for path, target in roles.targets.items() if path.endswith("attn2.to_k"))
    assert side.config.text == inputs["text"].shape[2] != keys.in_features
    roles.add_module("student", side)
    with torch.no_grad(), roles.installed():
        plain, found = (drawn(name, network, roles, inputs, Cond(inputs["text"]), w) for w in (None, W))
    assert float((found - plain).abs().max()) > 1e-3


def test_without_the_layer_that_reads_texts_it_is_refused() -> None:
    targets = {target.name: target for target in select(bind_diffusers(network_of("wan")), "attention")}
    with pytest.raises(OneStepError, match="that reads texts: use targets=all"):
        new_adapter(targets, "wan", 0)
