"""Steered forwards of diffusers' own networks against the formulas written out in NumPy (tests/support)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.models.attention_processor import AttnProcessor, IPAdapterAttnProcessor2_0, SlicedAttnProcessor
from narrowed import narrowed, thinned
from small_networks import inputs_of, seeded
from steered_networks import JOINT, SCALES, STEERINGS, UNETS, CrossOracle, away, doubled, pipe_of, replaced, run, texts
from tiny_pipelines import randomise
from torch import Tensor

MODES = list(SCALES)


def exact(name: str) -> float:
    """Of the largest value, in float64. diffusers computes Flux' rotary positions in float32, turns Qwen-Image's
    queries and keys in it, and norms Krea 2's."""
    return {"flux": 1e-7, "flux2": 1e-7, "chroma": 1e-7, "qwen_image": 1e-6, "krea2": 3e-6}.get(name, 1e-10)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def crossed(mode: str, negative: Tensor) -> Any:
    def choose(attn: Any) -> Any:
        inner = attn.processor if isinstance(attn.processor, IPAdapterAttnProcessor2_0) else None
        return CrossOracle(mode, negative, inner) if attn.is_cross_attention else None

    return choose


def residuals(name: str, network: Any) -> dict[str, Any]:
    """What a ControlNet adds: a real one's of a U-Net, any at the places where SD3 and Flux take them."""
    draw = seeded(4)
    if name != "sd15":
        parts = [draw(2, 16, 128)]
        return {"controlnet_block_samples" if name == "flux" else "block_controlnet_hidden_states": parts}
    control, inputs = ControlNetModel.from_unet(network).to(torch.float64), inputs_of(name)
    randomise(control)
    with torch.no_grad():
        down, mid = control(inputs["x"], inputs["time"], inputs["text"], draw(2, 3, 64, 64), return_dict=False)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def image_prompt(network: Any) -> dict[str, Any]:
    """Loads an IP-Adapter of random weights by diffusers' own loader; what the forward is told in addition."""
    draw, count = seeded(6), 4
    layers = [network.get_submodule(name.removesuffix(".processor")) for name in network.attn_processors]
    adapter = {}
    for number, attn in enumerate(attn for attn in layers if attn.is_cross_attention):
        for kind in ("k", "v"):
            adapter[f"{2 * number + 1}.to_{kind}_ip.weight"] = draw(attn.inner_dim, 24) / 5
    projection = {"proj.weight": draw(count * 24, 12) / 4, "proj.bias": draw(count * 24)}
    projection |= {"norm.weight": draw(24), "norm.bias": draw(24)}
    network._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": adapter}])
    network.to(torch.float64)
    return {"image_embeds": [draw(2, 1, 12)]}


@pytest.mark.parametrize(("length", "name", "mode"), thinned(5, [3, 5, 8], JOINT, MODES))
def test_one_picture_stream_is_the_doubled_form(name: str, mode: str, length: int) -> None:
    pipe, network = pipe_of(name)
    negative = texts(2 if length == 5 else 1, length)
    expected = doubled(name, network, mode, negative)
    plain = run(name, network)
    with away(pipe, negative, mode):
        found = run(name, network)
    close(found, expected, exact(name))
    assert (found - plain).abs().max() > 1e-2 * plain.abs().max()
    with away(pipe, negative, mode), pytest.raises(AssertionError):
        close(run(name, network), doubled_elsewhere(name, mode, negative), exact(name))


def doubled_elsewhere(name: str, mode: str, negative: Tensor) -> Tensor:
    """The doubled form of a slightly different negative: the comparison above is worth something."""
    _, network = pipe_of(name)
    return doubled(name, network, mode, negative + 1e-4)


@pytest.mark.parametrize("name", JOINT)
def test_in_float32_it_is_the_doubled_form_to_1e_5(name: str) -> None:
    negative = texts(1, 8)
    _, exact = pipe_of(name)
    pipe, network = pipe_of(name, torch.float32)
    with away(pipe, negative.float(), "nag"):
        close(run(name, network).double(), doubled(name, exact, "nag", negative), 1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", narrowed(UNETS, "sd15"))
def test_a_unet_is_its_formula(name: str, mode: str) -> None:
    pipe, network = pipe_of(name)
    negative = texts(1, 9)
    plain = run(name, network)
    expected = replaced(network, crossed(mode, negative))(lambda: run(name, network))
    with away(pipe, negative, mode):
        found = run(name, network)
    close(found, expected)
    assert (found - plain).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", narrowed(UNETS, "sd15"))
def test_the_decoder_alone_is_its_formula_behind_the_encoder(name: str, mode: str) -> None:
    pipe, network = pipe_of(name)
    negative = texts(1, 9)
    chosen = crossed(mode, negative)
    encoder = {id(module) for block in network.down_blocks for module in block.modules()}
    expected = replaced(network, lambda attn: None if id(attn) in encoder else chosen(attn))(lambda: run(name, network))
    with away(pipe, negative, replace(STEERINGS[mode], layers="decoder")):
        found = run(name, network)
    close(found, expected)
    with away(pipe, negative, mode):
        assert (found - run(name, network)).abs().max() > 1e-3 * found.abs().max()


@pytest.mark.parametrize("mode", MODES)
def test_an_ip_adapters_part_stays(mode: str) -> None:
    """NASA and NAG act on Z+ with the picture prompt's part in it; VSF leaves that part beside its own softmax."""
    pipe, network = pipe_of("sd15")
    negative, told = texts(1, 9), {"added_cond_kwargs": image_prompt(network)}
    inputs = inputs_of("sd15")

    def prompted() -> Tensor:
        with torch.no_grad():
            return network(inputs["x"], inputs["time"], inputs["text"], **told).sample

    plain = prompted()
    expected = replaced(network, crossed(mode, negative))(prompted)
    before = dict(network.attn_processors)
    with away(pipe, negative, mode):
        found = prompted()
        assert sum("_ip." in key for key in network.state_dict()) > 0, "its weights move with the network"
    close(found, expected)
    assert all(network.attn_processors[key] is value for key, value in before.items())
    assert torch.equal(prompted(), plain)


@pytest.mark.parametrize("name", ["sd15", "sd35", "flux"])
def test_a_control_net_acts_beside_it(name: str) -> None:
    pipe, network = pipe_of(name)
    negative, more = texts(1, 4), residuals(name, network)
    with away(pipe, negative, "nag"):
        found, without = run(name, network, **more), run(name, network)
    if name in UNETS:
        expected = replaced(network, crossed("nag", negative))(lambda: run(name, network, **more))
    else:
        expected = doubled(name, network, "nag", negative, **more)
    close(found, expected, exact(name))
    assert (found - without).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", narrowed(["sd15", "sd3", "flux", "flux2"], "sd15", "sd3"))
def test_fused_projections_draw_the_same(name: str, mode: str) -> None:
    pipe, network = pipe_of(name)
    negative = texts(1, 4)
    with away(pipe, negative, mode):
        expected = run(name, network)
    network.fuse_qkv_projections()
    with away(pipe, negative, mode):
        close(run(name, network), expected, exact(name))
    network.unfuse_qkv_projections()
    with away(pipe, negative, mode):
        close(run(name, network), expected, exact(name))


@pytest.mark.parametrize("mode", narrowed(MODES, "nasa", "vsf"))
@pytest.mark.parametrize("inner", [AttnProcessor(), SlicedAttnProcessor(2)], ids=["plain", "sliced"])
def test_any_processor_may_be_inside(inner: Any, mode: str) -> None:
    pipe, network = pipe_of("sd15")
    negative = texts(1, 4)
    with away(pipe, negative, mode):
        expected = run("sd15", network)
    network.set_attn_processor(inner)
    with away(pipe, negative, mode):
        close(run("sd15", network), expected)


@pytest.mark.parametrize("name", [*UNETS, *JOINT])
def test_each_row_has_its_negative(name: str) -> None:
    """Two prompts and two negatives in one batch are two runs; two pictures of each prompt are in a row."""
    pipe, network = pipe_of(name)
    negatives, inputs = texts(2, 6), inputs_of(name)
    alone = []
    for row in range(2):
        with away(pipe, negatives[row : row + 1], "nag"):
            alone.append(run(name, network, {key: value[row : row + 1] for key, value in inputs.items()}))
    with away(pipe, negatives, "nag"):
        close(run(name, network), torch.cat(alone), exact(name))
        each_twice = {key: value.repeat_interleave(2, 0) for key, value in inputs.items()}
        found = run(name, network, each_twice)
    close(found, torch.cat(alone).repeat_interleave(2, 0), exact(name))


@pytest.mark.parametrize(("rows", "name", "mode"), thinned(3, ["first half", "second half"], [*UNETS, *JOINT], MODES))
def test_half_of_a_batch_is_steered(name: str, mode: str, rows: Any) -> None:
    """Classifier-free guidance's null rows are those of a run without steering."""
    pipe, network = pipe_of(name)
    negatives, inputs = texts(2, 6), inputs_of(name)
    twice = {key: torch.cat([value, value]) for key, value in inputs.items()}
    plain = run(name, network)
    with away(pipe, negatives, mode):
        acting = run(name, network)
    with away(pipe, negatives, mode, rows=rows):
        found = run(name, network, twice)
    close(found, torch.cat([acting, plain] if rows == "first half" else [plain, acting]), exact(name))


@pytest.mark.parametrize("mode", ["nag", "nasa"])
def test_the_negative_goes_through_every_norm_of_its_attention(mode: str) -> None:
    """Of the same text Z- is Z+: NAG changes nothing, NASA leaves 1 - a of it."""
    pipe, network = pipe_of("sd15")
    attentions = [module for path, module in network.named_modules() if path.endswith("attn2")]
    for attn in attentions:
        norms = {"norm_cross": 24, "norm_q": attn.inner_dim // attn.heads, "norm_k": attn.inner_dim // attn.heads}
        for name, width in norms.items():
            setattr(attn, name, torch.nn.LayerNorm(width, dtype=torch.float64))
            randomise(getattr(attn, name))
    text = inputs_of("sd15")["text"]
    with away(pipe, text, mode):
        found = run("sd15", network)
    if mode == "nasa":
        for attn in attentions:
            attn.to_out[0].weight.mul_(1 - 0.3)
    close(found, run("sd15", network))
