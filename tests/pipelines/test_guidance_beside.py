"""A guidance adapter in diffusers beside what else a network holds: LoRAs, ControlNets, other weights of its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from small_networks import inputs_of, network_of, seeded
from steered_networks import run
from torch import Tensor

from onestep.core.adapter_file import save_adapter
from onestep.core.cond import Cond
from onestep.core.families import bind_diffusers, detect
from onestep.core.guidance_adapter import new_adapter
from onestep.core.roles import Roles
from onestep.pipelines.guidance_adapter import load_guidance_adapter

NAMES = ["sd15", "sd3", "flux"]
CLOSE = {"rtol": 1e-6, "atol": 1e-7}
W = 5.0


def made(name: str, folder: Path) -> tuple[Any, Any, Path]:
    """A network, an adapter for it away from its start, and its file."""
    network = network_of(name)
    side = new_adapter({target.name: target for target in bind_diffusers(network)}, detect(network), 1)
    draw = torch.Generator().manual_seed(2)
    for _, value in sorted(side.named_parameters()):
        value.detach().add_(0.2 * torch.randn(value.shape, generator=draw))
    save_adapter(folder / "x.safetensors", side, detect(network))
    return network, side.requires_grad_(False), folder / "x.safetensors"


def by_roles(name: str, network: Any, side: Any, **more: Any) -> Tensor:
    """By the side's own hooks alone: what the call is about is told to them by hand."""
    roles, inputs = Roles(bind_diffusers(network)), inputs_of(name)
    roles.add_module("guided", side)
    cond = Cond(inputs["text"], pooled=inputs.get("pooled"), guidance=torch.full((2,), W))
    with roles.installed(), roles.use("guided"):
        time = inputs["time"] * (1000 if name == "flux" else 1)
        with torch.no_grad(), roles.capture(2, time, cond):
            return run(name, network, **more)


def residuals(name: str, network: Any) -> dict[str, Any]:
    """What a ControlNet adds, where the network takes it."""
    draw = seeded(4)
    if name != "sd15":
        return {"controlnet_block_samples" if name == "flux" else "block_controlnet_hidden_states": [draw(2, 16, 128)]}
    blocks: list[Tensor] = []
    watched = [network.conv_in, *network.down_blocks]
    handles = [m.register_forward_hook(lambda _, __, out: blocks.extend(_skips(out))) for m in watched]
    run(name, network)
    for handle in handles:
        handle.remove()
    return {
        "down_block_additional_residuals": tuple(draw(*block.shape) for block in blocks),
        "mid_block_additional_residual": draw(*blocks[-1].shape),
    }


def _skips(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_control_net_acts_beside_it(name: str, tmp_path: Path) -> None:
    network, side, file = made(name, tmp_path)
    more = residuals(name, network)
    plain, controlled = run(name, network), run(name, network, **more)
    with load_guidance_adapter(network, file, W) as dial:
        both, alone = run(name, network, **more), run(name, network)
        dial.guidance = 1
        assert torch.equal(run(name, network, **more), controlled)
    torch.testing.assert_close(both, by_roles(name, network, side, **more), **CLOSE)
    for one, other in ((both, alone), (both, controlled), (alone, plain), (controlled, plain)):
        assert (one - other).abs().max() > 1e-3 * plain.std()


@pytest.mark.parametrize("name", NAMES)
def test_other_weights_of_the_same_base(name: str, tmp_path: Path) -> None:
    network, side, file = made(name, tmp_path)
    draw = torch.Generator().manual_seed(9)
    for value in network.parameters():
        value.detach().mul_(1 + 0.1 * torch.randn(value.shape, generator=draw))
    plain = run(name, network)
    with load_guidance_adapter(network, file, W):
        found = run(name, network)
    torch.testing.assert_close(found, by_roles(name, network, side), **CLOSE)
    assert (found - plain).abs().max() > 1e-3 * plain.std()


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_before_or_after_it_is_the_merged_weights(name: str, tmp_path: Path) -> None:
    """On the layers that the adapter hangs on, too."""
    layers = ["to_q", "to_k", "to_out.0"]
    expected: Tensor | None = None
    for first in ("lora", "adapter"):
        network, side, file = made(name, tmp_path)
        if first == "adapter":
            dial = load_guidance_adapter(network, file, W)
        torch.manual_seed(3)
        network.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=layers))
        network.to(torch.float64)
        if first == "lora":
            dial = load_guidance_adapter(network, file, W)
        found = run(name, network)
        dial.remove()
        if expected is None:
            network.fuse_lora()
            network.unload_lora()
            expected = by_roles(name, network, side)
        torch.testing.assert_close(found, expected, **CLOSE)
