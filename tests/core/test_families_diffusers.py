"""The families' tables against diffusers' own module trees, and adapters on them against peft and merged weights."""

from __future__ import annotations

from typing import Any

import pytest
import small_networks as small
import torch
from narrowed import narrowed
from peft import LoraConfig, inject_adapter_in_model
from published_networks import PUBLISHED, on_meta
from torch import Tensor, nn

from onestep.core import families
from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES, bind_diffusers, detect, select
from onestep.core.families.table import natural
from onestep.core.lora_keys import KeyMap, key_of
from onestep.core.roles import Roles

# Linear and Conv2d modules of the published models, as counted in their kohya files.
COUNTS = {"sd15": 282, "sdxl": 794, "qwen_image": 846, "anima": 454, "krea2": 264, "wan_1b": 306, "wan_14b": 406}
COUNTS |= {"chroma": 421, "lumina2": 244, "pixart": 287}


@pytest.mark.parametrize("name", narrowed(PUBLISHED, *list(PUBLISHED)[::4]))
def test_every_layer_of_the_published_models_is_a_target_or_has_a_reason(name: str) -> None:
    network = on_meta(name)
    family = FAMILIES[PUBLISHED[name][0]]
    assert detect(network) == PUBLISHED[name][0]
    names = [target.name for target in bind_diffusers(network)]
    layers = [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert sorted(names) == sorted(layer for layer in layers if not family.reason(layer))
    assert set(layers) == set(names) or PUBLISHED[name][0] in ("flux2", "chroma")
    assert len(names) == COUNTS.get(name, len(names))
    # of the root's own weights the names
    others = {weight.rpartition(".")[0] or weight for weight, _ in network.named_parameters()}
    assert all(family.reason(path) for path in others - set(names))
    assert not any(family.reason(path) for path in names)


@pytest.mark.parametrize("name", narrowed(PUBLISHED, *list(PUBLISHED)[::4]))
def test_kohya_names_of_the_published_models_are_unambiguous(name: str) -> None:
    names = [target.name for target in bind_diffusers(on_meta(name))]
    family = PUBLISHED[name][0]
    for keys in (KeyMap(family, names), KeyMap(family)):
        for layer in names:
            place = keys.find(key_of(family, layer)[0].removesuffix(".lora_down.weight").removesuffix(".lora_A.weight"))
            assert place is not None and place.names == (layer,)


@pytest.mark.parametrize("name", small.CASES)
def test_targets_come_in_an_order_of_their_names_alone(name: str) -> None:
    names = [target.name for target in bind_diffusers(small.network_of(name))]
    assert names == sorted(names, key=natural) and len(set(names)) == len(names)


def test_numbers_in_names_are_ordered_as_numbers() -> None:
    assert sorted(["a.10.x", "a.9.x", "a.9.b"], key=natural) == ["a.9.b", "a.9.x", "a.10.x"]


@pytest.mark.parametrize("name", small.CASES)
def test_adapters_do_what_merged_weights_do(name: str) -> None:
    """D and, by the chain rule through W + B A, its input gradient: float64 to 1e-10."""
    case, inputs = small.CASES[name], small.inputs_of(name)
    network = small.network_of(name)
    plain = case.run(network, inputs)
    targets = bind_diffusers(network)
    state = small.random_state(targets)
    adapted, slope = _with_roles(case, network, targets, state, inputs)
    small.merged(network, targets, state)
    expected, expected_slope = _with_slope(case, network, inputs)
    # diffusers rotates queries and keys, and takes RMS norms, in float32.
    rough = ("flux", "sd35", "z_image", "flux2", "qwen_image", "anima", "krea2", "wan", "chroma", "lumina2", "pixart")
    tolerance = 1e-5 if name in rough else 1e-10
    assert _gap(adapted, expected) < tolerance and _gap(slope, expected_slope) < tolerance
    assert _gap(plain, expected) > 0.05


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_adapters_equal_those_of_peft(name: str) -> None:
    """Output and the gradient of every factor, on the same weights, to 1e-6."""
    case, inputs = small.CASES[name], small.inputs_of(name, torch.float32)
    network = small.network_of(name, torch.float32)
    targets = bind_diffusers(network)
    state = small.random_state(targets)
    roles = Roles(targets)
    roles.load("student", state)
    ours = _run(case, network, roles, inputs)
    ours.square().sum().backward()
    gradients = dict(zip(sorted(state), zip(*[iter(roles.parameters("student"))] * 2, strict=True), strict=True))

    layers = _peft(small.network_of(name, torch.float32), state)
    theirs = case.run(layers["network"], inputs)
    theirs.square().sum().backward()
    assert _gap(ours, theirs) < 1e-6
    for target, (a, b) in gradients.items():
        layer = layers["network"].get_submodule(target)
        # 2e-5: float32 sums of thousands of terms in another order; a missing factor or a swap is of order 1.
        assert _gap(a.grad, layer.lora_A["default"].weight.grad) < 2e-5, target
        assert _gap(b.grad, layer.lora_B["default"].weight.grad) < 2e-5, target


def test_selections_grow_and_leave_nothing_out() -> None:
    names = {}
    for which in ("attention", "attention+mlp", "all"):
        names[which] = {target.name for target in select(bind_diffusers(small.network_of("flux")), which)}
    assert names["attention"] < names["attention+mlp"] < names["all"]
    assert {"transformer_blocks.0.attn.add_q_proj", "single_transformer_blocks.0.proj_out"} <= names["attention"]
    mlp = names["attention+mlp"] - names["attention"]
    assert mlp == {
        *(
            "transformer_blocks.0.ff.net.0.proj",
            "transformer_blocks.0.ff.net.2",
            "single_transformer_blocks.0.proj_mlp",
        ),
        *("transformer_blocks.0.ff_context.net.0.proj", "transformer_blocks.0.ff_context.net.2"),
    }
    with pytest.raises(OneStepError, match="everything"):
        select([], "everything")


def test_attention_of_a_unet_is_its_eight_projections() -> None:
    chosen = select(bind_diffusers(small.network_of("sd15")), "attention")
    assert all(".attn1.to_" in target.name or ".attn2.to_" in target.name for target in chosen)
    assert len(chosen) == 8 * 6  # two transformers down, one in the middle, three up


@pytest.mark.parametrize("title", sorted(set(families.LATER)))
def test_families_of_later_are_refused_by_name(title: str) -> None:
    with pytest.raises(OneStepError, match="cannot be adapted yet"):
        detect(type(title, (nn.Module,), {})())


def test_other_networks_are_refused_with_a_word() -> None:
    with pytest.raises(OneStepError, match="Sequential"):
        detect(nn.Sequential())
    network = small.network_of("sd15")
    network.surprise = nn.Linear(2, 2)  # type: ignore[assignment]
    with pytest.raises(OneStepError, match="surprise"):
        bind_diffusers(network)


def test_a_network_that_peft_or_fusing_has_changed_is_refused_with_the_way_out() -> None:
    network = small.network_of("sd15")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), network)
    with pytest.raises(OneStepError, match="fuse_lora"):
        bind_diffusers(network)
    fused: Any = small.network_of("sd15")
    fused.fuse_qkv_projections()
    with pytest.raises(OneStepError, match="unfuse_qkv_projections"):
        bind_diffusers(fused)


def _peft(network: nn.Module, state: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    config = LoraConfig(r=3, lora_alpha=3, target_modules=list(state))
    inject_adapter_in_model(config, network)
    for name, (a, b) in state.items():
        layer: Any = network.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    return {"network": network}


def _run(case: small.Case, network: nn.Module, roles: Roles, inputs: small.Inputs) -> Tensor:
    roles.install()
    try:
        with roles.use("student"), roles.capture(len(inputs["x"])):
            return case.run(network, inputs)
    finally:
        roles.remove()


def _with_roles(case: Any, network: Any, targets: Any, state: Any, inputs: small.Inputs) -> tuple[Tensor, Tensor]:
    roles = Roles(targets)
    roles.load("student", state)
    x = inputs["x"].clone().requires_grad_(True)
    out = _run(case, network, roles, {**inputs, "x": x})
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]


def _with_slope(case: Any, network: Any, inputs: small.Inputs) -> tuple[Tensor, Tensor]:
    x = inputs["x"].clone().requires_grad_(True)
    out = case.run(network, {**inputs, "x": x})
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]


def _gap(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None and expected is not None
    return float((found - expected).detach().norm() / expected.detach().norm().clamp_min(1e-30))
