"""What `steered` leaves behind, keeps apart and refuses; LoRAs, formats and compilation beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import LuminaNextDiT2DModel
from diffusers.models.attention_processor import AttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from narrowed import narrowed, thinned
from peft import LoraConfig
from small_networks import CASES, inputs_of
from steered_networks import JOINT, STEERINGS, UNETS, away, pipe_of, run, texts
from tiny_pipelines import make, vae
from torch import Tensor

from onestep.core.errors import OneStepError
from onestep.pipelines import Steering, adapt, steered
from onestep.pipelines.threads import processors_of

NAMES = [*UNETS, *JOINT, "z_image"]


@contextmanager
def unchanged(network: Any) -> Iterator[None]:
    """The same processors, hooks, weights and modules after as before."""

    def state() -> tuple[Any, ...]:
        hooks = [len(network._forward_pre_hooks), len(network._forward_hooks)]
        weights = {name: (value.data_ptr(), value._version) for name, value in network.state_dict().items()}
        return processors_of(network), hooks, list(dict(network.named_modules())), weights

    before = state()
    yield
    assert state() == before


@pytest.mark.parametrize(("name", "mode"), thinned(3, NAMES, ["nasa", "nag", "vsf", "perp"]))
def test_the_network_is_given_back_as_it_was(name: str, mode: str) -> None:
    pipe, network = pipe_of(name, torch.float32)
    negative = texts(1, 6).float()
    plain = run(name, network)
    with unchanged(network):
        with away(pipe, negative, mode):
            acting = run(name, network)
        assert torch.equal(run(name, network), plain) and not torch.equal(acting, plain)
        with pytest.raises(ZeroDivisionError), away(pipe, negative, mode):
            run(name, network)
            1 / 0  # noqa: B018
        assert torch.equal(run(name, network), plain)
        with away(pipe, negative, mode):
            assert torch.equal(run(name, network), acting)


NEUTRAL = [Steering("nasa", 0.0), Steering("nag", 1.0), Steering("nag", 4.0, alpha=0.0), Steering("perp", 1)]


@pytest.mark.parametrize(("name", "steering"), thinned(3, NAMES, NEUTRAL))
def test_neutral_is_bit_identical(name: str, steering: Steering) -> None:
    pipe, network = pipe_of(name, torch.float32)
    plain = run(name, network)
    with unchanged(network), steered(pipe, texts(1, 6).float(), steering):
        assert not network._forward_pre_hooks
        assert torch.equal(run(name, network), plain)


def test_two_networks_and_two_steerings_stay_apart() -> None:
    (one, first), (two, second) = pipe_of("sd15"), pipe_of("sd15")
    plain = run("sd15", first)
    weak, strong = texts(1, 6), texts(1, 9, seed=8)
    with steered(one, weak, "nasa", scale=0.1):
        alone = run("sd15", first)
        assert torch.equal(run("sd15", second), plain)
        with steered(two, strong, "nag", scale=6):
            assert torch.equal(run("sd15", first), alone)
            other = run("sd15", second)
        assert torch.equal(run("sd15", first), alone) and torch.equal(run("sd15", second), plain)
    with steered(one, strong, "nag", scale=6):
        assert torch.equal(run("sd15", first), other)
    assert not torch.equal(alone, other)


# -- weights that change ----------------------------------------------------------------------------------------------


def with_lora(network: Any, name: str) -> None:
    added = ["add_k_proj", "add_v_proj"] if name in ("sd3", "sd35") else []
    network.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v", *added], init_lora_weights=False), "one")
    torch.nn.Module.to(network, torch.float64)
    torch.manual_seed(3)
    for path, weight in network.named_parameters():
        if "lora_" in path:
            torch.nn.init.normal_(weight, std=0.3)


@pytest.mark.parametrize("name", narrowed(["sd15", "sd35", "flux", "flux2", "z_image"], "sd15", "flux"))
def test_a_lora_acts_on_the_negatives_keys_and_values_too(name: str) -> None:
    """At each scale the same as with the LoRA folded into the weights, though the scale changes within `steered`."""
    pipe, network = pipe_of(name)
    with_lora(network, name)
    key = "cross_attention_kwargs" if name in UNETS else "joint_attention_kwargs"
    negative, found = texts(1, 6), {}
    with steered(pipe, negative, "nag"):
        for scale in (1.0, 0.25, 0.0):
            found[scale] = run(name, network, **{key: {"scale": scale}})
    for scale, expected in found.items():
        pipe, folded = pipe_of(name)
        with_lora(folded, name)
        folded.fuse_lora(lora_scale=scale)
        folded.unload_lora()
        with steered(pipe, negative, "nag"):
            torch.testing.assert_close(run(name, folded), expected, rtol=0, atol=1e-6)
    assert (found[1.0] - found[0.25]).abs().max() > 1e-3


@pytest.mark.parametrize("cache", [True, False])
def test_keys_and_values_are_kept_only_where_asked(cache: bool) -> None:
    pipe, network = pipe_of("sd15")
    layer = next(module for path, module in network.named_modules() if path.endswith("attn2.to_k"))
    lengths: list[int] = []
    handle = layer.register_forward_hook(lambda _, given, __: lengths.append(given[0].shape[1]))
    negative = texts(1, 6)
    with steered(pipe, negative, "nag", cache=cache):
        outs = [run("sd15", network) for _ in range(3)]
    assert lengths == ([5, 6, 5, 5] if cache else [5, 6] * 3)
    assert all(torch.equal(out, outs[0]) for out in outs)
    handle.remove()
    with torch.no_grad():
        layer.weight.mul_(1.5)
    with steered(pipe, negative, "nag", cache=cache):
        again = run("sd15", network)
    fresh, other = pipe_of("sd15")
    other.load_state_dict(network.state_dict())
    with steered(fresh, negative, "nag"):
        assert torch.equal(run("sd15", other), again) and not torch.equal(again, outs[0])


@pytest.mark.parametrize(
    ("name", "mode", "dtype"),
    thinned(5, ["sd15", "sd35", "flux"], ["nasa", "nag", "vsf", "perp"], [torch.bfloat16, torch.float16]),
)
def test_half_precision_is_the_same_but_for_its_rounding(name: str, mode: str, dtype: torch.dtype) -> None:
    pipe, network = pipe_of(name)
    half, narrow = pipe_of(name, dtype)
    plain, plain_narrow = run(name, network), run(name, narrow)
    with away(pipe, texts(1, 6), mode), away(half, texts(1, 6).to(dtype), mode):
        acting, acting_narrow = run(name, network), run(name, narrow)
    assert acting_narrow.dtype == dtype
    rounding = (plain_narrow.double() - plain).abs().mean()
    assert (acting_narrow.double() - acting).abs().mean() <= 4 * rounding
    # bfloat16 rounds the plain network's own answer by as much as a negative changes it
    assert dtype == torch.bfloat16 or 4 * rounding < 0.5 * (acting - plain).abs().mean()


@pytest.mark.broad
@pytest.mark.slow
@pytest.mark.parametrize("name", narrowed(["sd15", "sd35", "flux", "flux2"], "sd15"))
def test_a_compiled_network_follows_each_steering(name: str) -> None:
    """Compiled before: plain, steered, steered by another negative (Flux: at another scale too), and plain again."""
    torch._dynamo.reset()
    pipe, network = pipe_of(name, torch.float32)
    calls: list[tuple[Tensor, dict[str, Any]]] = [
        (texts(1, 6).float(), {"scale": 3.0}),
        (texts(1, 6, seed=8).float(), {"scale": 6.0 if name == "flux" else 3.0}),
    ]
    plain, expected = run(name, network), []
    for negative, more in calls:
        with steered(pipe, negative, "nag", **more):
            expected.append(run(name, network))
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    setattr(pipe, "unet" if name in UNETS else "transformer", compiled)
    assert torch.equal(run(name, compiled), plain)
    for (negative, more), one in zip(calls, expected, strict=True):
        with steered(pipe, negative, "nag", **more):
            torch.testing.assert_close(run(name, compiled), one, rtol=0, atol=1e-5)
    assert torch.equal(run(name, compiled), plain)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "negative", "more", "why"),
    [
        ("sd15", texts(1, 6)[:, :, :20], {}, "20 wide, this network reads 24"),
        ("sd35", torch.zeros(1, 6, 64), {}, "64 wide, this network reads 24"),
        *((name, torch.zeros(1, 6, 64), {}, "64 wide, this network reads 24") for name in ("flux", "flux2")),
        ("z_image", torch.zeros(1, 6, 64), {}, "64 wide, this network reads 24"),
        ("sd15", texts(1, 6)[0], {}, r"the negative is \(6, 24\)"),
        ("sd15", 7, {}, "the negative is int"),
        ("sd15", texts(1, 6), {"scale": float("nan")}, "scale is nan"),
        ("sd15", texts(1, 6), {"scale": -1.0}, "scale is -1.0"),
        ("sd15", texts(1, 6), {"steering": "cfg"}, "no steering mode 'cfg'"),
        ("sd15", texts(1, 6), {"steering": "perp"}, "perp measures from the empty text: give empty="),
        ("sd15", texts(1, 6), {"steering": "perp", "empty": texts(2, 6)}, "there are 2 empty texts: give one"),
        ("sd35", texts(1, 6), {"steering": "perp", "empty": torch.zeros(1, 6, 64)}, "empty text's tokens are 64 wide"),
        ("sd15", texts(1, 6), {"start": 0.5, "end": 0.5}, "from 0.5 to 0.5"),
        ("sd15", texts(1, 6), {"end": 1.5}, "from 0.0 to 1.5"),
        ("sd15", texts(1, 6), {"rows": "both"}, "rows is 'both'"),
        ("flux", texts(1, 6), {"steering": Steering("nag", 5.0, layers="decoder")}, "which only U-Nets have"),
    ],
)
def test_bad_input_is_said_before_anything_changes(name: str, negative: Any, more: dict[str, Any], why: str) -> None:
    pipe, network = pipe_of(name)
    with unchanged(network), pytest.raises(OneStepError, match=why), steered(pipe, negative, **more):
        raise AssertionError("it must not begin")


def test_a_batch_that_does_not_fit_is_said() -> None:
    for name in ("sd15", "sd35"):
        pipe, network = pipe_of(name)
        with unchanged(network):
            why = "2 rows, of which all are steered, and there are 3"
            with pytest.raises(OneStepError, match=why), steered(pipe, texts(3, 6)):
                run(name, network)
            why = "first half are steered, and there are 2"
            with pytest.raises(OneStepError, match=why), steered(pipe, texts(2, 6), rows="first half"):
                run(name, network)


def test_an_unserved_network_is_said() -> None:
    class Pipe:
        transformer = LuminaNextDiT2DModel(
            **{"sample_size": 4, "hidden_size": 24, "num_layers": 1, "num_attention_heads": 2},
            **{"num_kv_heads": 1, "cross_attention_dim": 24},
        )
        scheduler = make("sd").scheduler

    with pytest.raises(OneStepError, match="LuminaNextDiT2DModel is not served"), steered(Pipe(), texts(1, 6)):
        pass
    with pytest.raises(OneStepError, match="no U-Net or transformer"), steered(object(), texts(1, 6)):
        pass


@pytest.mark.parametrize("name", ["sd35", "flux"])
def test_an_ip_adapter_of_a_transformer_is_refused(name: str) -> None:
    pipe, network = pipe_of(name)
    found = dict(network.attn_processors)
    adapter = SD3IPAdapterJointAttnProcessor2_0(128, 24, 64) if name == "sd35" else FluxIPAdapterAttnProcessor(128, 24)
    first = next(path for path in found if path.endswith("attn.processor"))
    network.set_attn_processor({**found, first: adapter})
    refused = pytest.raises(OneStepError, match="has an IP-Adapter.*take it off")
    with unchanged(network), refused, steered(pipe, texts(1, 6)):
        pass


def test_steering_twice_is_refused() -> None:
    pipe, network = pipe_of("sd15")
    with unchanged(network), steered(pipe, texts(1, 6)):
        before = run("sd15", network)
        with pytest.raises(OneStepError, match="steered already"), steered(pipe, texts(1, 6)):
            pass
        assert torch.equal(run("sd15", network), before)


def test_a_mask_is_refused_where_it_cannot_be_followed() -> None:
    pipe, network = pipe_of("flux")
    mask = torch.ones(2, 1, 1, 21, dtype=torch.bool)
    with pytest.raises(OneStepError, match="mask over the prompt's tokens"), steered(pipe, texts(1, 6)):
        run("flux", network, joint_attention_kwargs={"attention_mask": mask})


@pytest.mark.parametrize("mode", ["nag", "vsf"])
def test_a_masked_prompt_is_steered(mode: str) -> None:
    """The mask hides the positive's padding from Z+: as if that token were not there."""
    pipe, network = pipe_of("sd15")
    inputs = inputs_of("sd15")
    shorter = {**inputs, "text": inputs["text"][:, :4]}
    mask = torch.tensor([[1, 1, 1, 1, 0]] * 2, dtype=torch.bool)
    with steered(pipe, texts(1, 6), mode):
        found = run("sd15", network, encoder_attention_mask=mask)
        torch.testing.assert_close(found, run("sd15", network, shorter), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["sd15", "sd35", "flux", "z_image"])
def test_it_does_not_act_in_training(name: str) -> None:
    pipe, network = pipe_of(name)
    network.requires_grad_(True).train()
    network.enable_gradient_checkpointing()
    with steered(pipe, texts(1, 6)):
        run(name, network)  # under no_grad nothing is recomputed
        with pytest.raises(OneStepError, match="under gradient checkpointing"), torch.enable_grad():
            CASES[name].run(network, inputs_of(name))
        pipe.vae = vae(4 if name in UNETS else 16)
        host = adapt(pipe)
        with pytest.raises(OneStepError, match="steered by a negative"), host.training():
            pass
        host.release()


@pytest.mark.parametrize("name", ["sd15", "sd35", "flux", "flux2", "z_image"])
def test_gradients_pass_without_checkpointing(name: str) -> None:
    """Finite differences of the picture's sum along one direction; SD3 and Flux round to float32 on their way."""
    pipe, network = pipe_of(name)
    inputs = inputs_of(name)
    direction = inputs["x"].sin()
    with steered(pipe, texts(1, 6), STEERINGS["nag"]):
        x = inputs["x"].clone().requires_grad_(True)
        CASES[name].run(network, {**inputs, "x": x}).sum().backward()
        ends = [run(name, network, {**inputs, "x": inputs["x"] + h * direction}).sum() for h in (1e-3, -1e-3)]
    slope = (ends[0] - ends[1]) / 2e-3
    torch.testing.assert_close((x.grad * direction).sum(), slope, rtol=1e-3, atol=0)


def test_processors_set_within_are_not_passed_over_in_silence() -> None:
    pipe, network = pipe_of("sd15")
    with pytest.raises(OneStepError, match="could not act"), steered(pipe, texts(1, 6)):
        network.set_attn_processor(AttnProcessor2_0())
        run("sd15", network)
    assert all(isinstance(found, AttnProcessor2_0) for found in network.attn_processors.values())
