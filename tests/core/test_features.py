"""What a network gives at its blocks: which blocks, and each as a picture."""

from __future__ import annotations

from typing import Any

import pytest
import small_networks as small
import torch
from published_networks import PUBLISHED, on_meta
from torch import Tensor, nn

from onestep.core.checkpoint import checkpoint_blocks
from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES, bind_diffusers, blocks_of, select
from onestep.core.features import Features, as_picture
from onestep.core.roles import Roles
from onestep.core.targets import Target

MIDDLES = {
    **{"sd15": "mid_block.resnets.1", "sd2": "mid_block.resnets.1", "sdxl": "mid_block.resnets.1"},
    **{"sd3": "transformer_blocks.11", "sd35_medium": "transformer_blocks.11"},
    **{"flux": "single_transformer_blocks.9", "z_image": "layers.14", "klein_4b": "single_transformer_blocks.7"},
    **{
        "klein_9b": "single_transformer_blocks.7",
        "flux2_dev": "single_transformer_blocks.19",
        "anima": "transformer_blocks.13",
        "qwen_image": "transformer_blocks.29",
        "krea2": "transformer_blocks.13",
        **{"wan_1b": "blocks.14", "wan_14b": "blocks.19", "wan_5b": "blocks.14"},
        "chroma": "single_transformer_blocks.9",
        "pixart": "transformer_blocks.13",
        "lumina2": "layers.12",
    },
}

KINDS = {kind: block for family in ("unet", "sd3", "flux") for kind, block in FAMILIES[family].blocks.items()}


def looking(network: Any, count: int, targets: str = "all") -> Features:
    found = select(bind_diffusers(network), targets)
    return Features({target.name: target for target in found}, blocks_of(network), count)


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_block_is_the_middle(name: str) -> None:
    assert looking(on_meta(name), 1).names == [MIDDLES[name]]


@pytest.mark.broad
def test_several_are_spread_in_the_networks_order() -> None:
    network = on_meta("sdxl")
    names = looking(network, 4).names
    assert names[-1] == "mid_block.resnets.1" and len(set(names)) == 4
    assert [name.split(".")[1] for name in names[:-1]] == sorted(name.split(".")[1] for name in names[:-1])
    paths = [path for path, module in network.named_modules() if module in set(blocks_of(network))]
    below = [path for path in paths if path.startswith(("down_blocks", "mid_block"))]
    every = looking(network, len(below)).names
    assert sorted(every) == sorted(below)
    # a residual block, its attention's blocks, the next residual block
    assert every[:4] == [f"down_blocks.0.resnets.{i}" for i in (0, 1)] + ["down_blocks.1.resnets.0"] + [
        "down_blocks.1.attentions.0.transformer_blocks.0"
    ]
    assert looking(on_meta("sd3"), 3).names == [f"transformer_blocks.{i}" for i in (3, 11, 19)]


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_a_run_on_attentions_alone_looks_at_a_block_of_them(name: str) -> None:
    names = looking(small.network_of(name), 1, "attention").names
    assert "transformer_blocks" in names[0]


@pytest.mark.parametrize("name", small.CASES)
def test_the_picture_is_what_the_block_gives(name: str) -> None:
    """By a hook of the test's own; tokens lie row by row. The network is as it was before and after."""
    case, network, inputs = small.CASES[name], small.network_of(name), small.inputs_of(name)
    plain = case.run(network, inputs)
    features = looking(network, 2)
    seen: dict[str, Any] = {}
    handles = [
        network.get_submodule(path).register_forward_hook(lambda m, a, output, path=path: seen.update({path: output}))
        for path in features.names
    ]
    with features.kept(inputs["x"]) as found:
        answer = case.run(network, inputs)
    assert torch.equal(answer, plain)
    for path, value in zip(features.names, found, strict=True):
        given = seen[path] if isinstance(seen[path], Tensor) else seen[path][1]
        rows, columns = value.shape[2:]
        if given.ndim == 4:
            assert torch.equal(value, given)
        else:
            # behind Z-Image's picture lie what fills it up and the text; before others' last blocks' the text
            last = (name in ("flux2", "chroma") and path.startswith("single")) or name == "lumina2"
            first = 5 if name == "krea2" or last else 0
            assert rows * columns == (24 if name == "z_image" else given.shape[1] - first)
            assert rows * inputs["x"].shape[3] == columns * inputs["x"].shape[2]
            assert torch.equal(value[:, :, 1, 2 % columns], given[:, first + columns + 2 % columns])
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (5, 7), (13, 8)])
def test_tokens_of_any_size_find_their_rows(size: tuple[int, int]) -> None:
    """A U-Net's levels halve, rounding up; its tokens are numbered row by row."""
    height, width = size
    for _ in range(3):
        tokens = torch.arange(height * width).view(1, -1, 1)
        found = as_picture(KINDS["BasicTransformerBlock"], tokens, size)
        assert torch.equal(found, torch.arange(height * width).view(1, 1, height, width))
        height, width = -(-height // 2), -(-width // 2)


def test_where_text_and_picture_are_one_sequence_the_picture_is_its_end() -> None:
    """ComfyUI's SingleStreamBlock; a tuple's picture is where its class has it."""
    picture = torch.arange(6).view(1, 6, 1)
    joint = torch.cat([torch.full((1, 5, 1), -1), picture], 1)
    wanted = torch.arange(6).view(1, 1, 2, 3)
    assert torch.equal(as_picture(KINDS["SingleStreamBlock"], joint, (4, 6)), wanted)
    text = torch.full((1, 5, 1), -1)
    assert torch.equal(as_picture(KINDS["DoubleStreamBlock"], (picture, text), (4, 6)), wanted)
    for kind in ("JointBlock", "JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"):
        assert torch.equal(as_picture(KINDS[kind], (text, picture), (4, 6)), wanted)
    with pytest.raises(OneStepError, match=r"5 tokens for latents of \(4, 6\)"):
        as_picture(KINDS["BasicTransformerBlock"], text, (4, 6))


def test_a_gradient_through_a_checkpointed_block_is_the_same() -> None:
    network, inputs = small.network_of("sd15"), small.inputs_of("sd15")
    features, gradients = looking(network, 3), []
    for blocks in ([], blocks_of(network)):
        x = inputs["x"].clone().requires_grad_()
        roles = Roles([])
        with checkpoint_blocks(blocks, roles), features.kept(x) as found, roles.capture(len(x)):
            small.CASES["sd15"].run(network, {**inputs, "x": x})
        gradients += torch.autograd.grad(sum(value.square().sum() for value in found), x)  # type: ignore[arg-type]
    assert torch.equal(*gradients) and bool(gradients[0].any())


class Adding(nn.Module):
    """Writes what it adds into what it was given, as ComfyUI's Flux does."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x += self.proj(x.clone())
        return x


def test_what_a_later_block_writes_into_a_feature_does_not_reach_it() -> None:
    blocks = [Adding(), Adding()]
    targets = {f"transformer_blocks.{i}.ff": Target(f"ff {i}", block.proj) for i, block in enumerate(blocks)}
    x = torch.randn(2, 4, 3)
    wanted = [(x + blocks[0].proj(x)).detach()]
    wanted += [(wanted[0] + blocks[1].proj(wanted[0])).detach()]
    with torch.no_grad(), Features(targets, blocks, 2).kept(torch.zeros(2, 1, 4, 4)) as found:
        blocks[1](blocks[0](x.clone()))
    for value, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(value.flatten(2).transpose(1, 2), expected)


def test_where_there_is_nothing_to_look_at_it_says_so() -> None:
    network = small.network_of("sd15")
    targets = {target.name: target for target in bind_diffusers(network)}
    assert (
        len(Features(targets, blocks_of(network), 40).names) == len(Features(targets, blocks_of(network), 9).names) == 9
    )
    for blocks, layers in (([], targets), (blocks_of(network), {})):
        with pytest.raises(OneStepError, match="no blocks .* could look at: choose a method without a head"):
            Features(layers, blocks, 1)
