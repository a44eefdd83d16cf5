"""The control adapter: nothing when new, its features where they belong in real networks, its file, its refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import narrowed
from small_networks import CASES, inputs_of, network_of, random_state, seeded
from torch import Tensor, nn

from onestep.core.adapter_file import check_adapter, load_adapter, save_adapter
from onestep.core.adapter_module import Call, Port
from onestep.core.checkpoint import checkpoint_blocks
from onestep.core.cond import Cond
from onestep.core.control import ControlAdapter, entry_of, fitted, new_adapter, places_of
from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES, bind_diffusers
from onestep.core.roles import TEACHER, Roles
from onestep.core.tensor_file import read_tensors

SIZE = (64, 64)  # of the pictures: latents are 8 x 8
PLACES = {
    "sd15": {
        "conv_in": (32, 1),
        "down_blocks.0.attentions.0.proj_out": (32, 1),
        "down_blocks.0.attentions.1.proj_out": (32, 1),
        "down_blocks.1.resnets.0.conv2": (64, 2),
        "down_blocks.1.resnets.1.conv2": (64, 2),
        "mid_block.resnets.1.conv2": (64, 2),
    },
    "sdxl": {
        "conv_in": (32, 1),
        "down_blocks.0.resnets.0.conv2": (32, 1),
        "down_blocks.0.resnets.1.conv2": (32, 1),
        "down_blocks.1.attentions.0.proj_out": (64, 2),
        "down_blocks.1.attentions.1.proj_out": (64, 2),
        "down_blocks.2.attentions.0.proj_out": (64, 4),
        "down_blocks.2.attentions.1.proj_out": (64, 4),
        "mid_block.resnets.1.conv2": (64, 4),
    },
    "sd3": {"pos_embed.proj": (128, 1)},
    "sd35": {"pos_embed.proj": (128, 1)},
    "flux": {"x_embedder": (128, 1)},
    "flux2": {"x_embedder": (64, 1)},
    "chroma": {"x_embedder": (32, 1)},
    "qwen_image": {"img_in": (64, 1)},
    "z_image": {"all_x_embedder.2-1": (288, 1)},
    "anima": {"patch_embed.proj": (48, 1)},
    "krea2": {"img_in": (64, 1)},
    "lumina2": {"x_embedder": (96, 1)},
    "wan": {"patch_embedding": (24, 1)},
    "pixart": {"pos_embed.proj": (48, 1)},
}


def roles_of(name: str, network: nn.Module) -> Roles:
    return Roles(bind_diffusers(network), Port(network, entry=entry_of(CASES[name].family, network)))


class World:
    """A tiny real network in float64, its roles, and an adapter of control pictures [B, 2, 64, 64], or as large as its
    latents ask for."""

    def __init__(self, name: str, sees_latents: bool = True, seed: int = 0) -> None:
        self.case, self.network, self.inputs = CASES[name], network_of(name), inputs_of(name)
        self.roles = roles_of(name, self.network)
        shape = tuple(self.inputs["x"].shape[1:])
        size = 8 * shape[2], 8 * shape[1]
        self.side = new_adapter(
            *(self.case.family, self.roles.modules.places, ("mine", 2), size, shape),
            width=16,
            sees_latents=sees_latents,
            seed=seed,
        )
        self.roles.load("student", random_state(self.roles.targets.values()))
        self.roles.add_module("student", self.side)
        self.control = seeded(7)(2, 2, *size[::-1]).sigmoid()

    def stir(self) -> None:
        """Away from the zeros at the start."""
        draw = seeded(5)
        for leave in self.side.leave:
            for value in leave.parameters():
                value.data = (0.1 * draw(*value.shape)).to(value)

    def __call__(self, role: str = "student", **told: Any) -> Tensor:
        cond = Cond(self.inputs["text"])
        with self.roles.use(role, **told):
            captured = self.roles.capture(len(self.inputs["x"]), self.inputs["time"], cond)
        with self.roles.installed(), captured:
            return self.case.run(self.network, self.inputs)


SERVED = [name for name, case in CASES.items() if FAMILIES[case.family].entry]


def test_a_family_without_a_known_entry_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "flux2", replace(FAMILIES["flux2"], entry=""))
    with pytest.raises(OneStepError, match="FLUX.2 models cannot have a control adapter yet"):
        places_of("flux2", {})


@pytest.mark.parametrize("name", SERVED)
def test_it_acts_behind_the_entry_and_every_block_of_the_encoder(name: str) -> None:
    places = places_of(CASES[name].family, roles_of(name, network_of(name)).modules.places)
    assert {place.name: (place.channels, place.stride) for place in places} == PLACES[name]


@pytest.mark.parametrize("name", narrowed(SERVED, "sd15", "sd3", "flux", "z_image"))
def test_a_new_adapter_is_bit_identical_to_none(name: str) -> None:
    world = World(name)
    with torch.no_grad():
        plain = world()
        assert torch.equal(world(control=world.control), plain)
        world.stir()
        assert torch.equal(world(control=None), plain)
        assert torch.equal(world(control=world.control, strength=0.0), plain)
        assert not torch.allclose(world(control=world.control), plain, rtol=1e-4)
        assert torch.equal(world(TEACHER, control=world.control), world(TEACHER))


@pytest.mark.parametrize("name", narrowed(SERVED, "sd15", "sd3", "flux", "z_image"))
def test_its_features_are_added_to_what_the_layers_give(name: str) -> None:
    """By hand: the encoder asked apart, and a hook of the test's own at each place."""
    world = World(name)
    world.stir()
    x = world.inputs["x"]
    patch = FAMILIES[world.case.family].patch
    grid, seen = (x.shape[2] // patch, x.shape[3] // patch), x
    if patch > 1:  # 2 x 2 latents are one cell, channels first, but in Z-Image and Lumina 2
        order = (0, 3, 5, 1, 2, 4) if name in ("z_image", "lumina2") else (0, 1, 3, 5, 2, 4)
        seen = x.unflatten(2, (grid[0], 2)).unflatten(4, (grid[1], 2)).permute(order).flatten(1, 3)
    with torch.no_grad():
        features = world.side(world.control, seen)
        found, plain = world(control=world.control, strength=0.5), world()
        handles = []
        for place, feature in zip(world.side.config.places, features, strict=True):
            cells = tuple(side // place.stride for side in (x.shape[2:] if world.case.family == "unet" else grid))
            assert feature.shape[1:] == (place.channels, *cells)
            handles.append(world.roles.modules.places[place.name].module.register_forward_hook(_adding(0.5 * feature)))
        try:
            wanted = world()
        finally:
            for handle in handles:
                handle.remove()
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-9) and not torch.allclose(plain, wanted)


def _adding(feature: Tensor) -> Any:
    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        first = output.ndim == 4 or (output.ndim == 5 and output.shape[1] == feature.shape[1])
        flat = feature if first else feature.flatten(2).transpose(1, 2)
        if output.ndim == 2:  # Z-Image's pictures in one row, each of 24 tokens filled up to 32
            flat = nn.functional.pad(flat, (0, 0, 0, 8)).flatten(0, 1)
        return output + flat.to(output).view_as(output)

    return add


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_gradients_are_finite_differences(name: str, checkpointing: bool) -> None:
    world = World(name)
    world.stir()
    side = world.side.double()
    weights = seeded(9)(*world.inputs["x"].shape)

    def value() -> Tensor:
        return (world(control=world.control, strength=0.7) * weights).sum()

    blocks = [*getattr(world.network, "down_blocks", []), *getattr(world.network, "transformer_blocks", [])]
    with world.roles.installed(), checkpoint_blocks(blocks if checkpointing else [], world.roles):
        value().backward()
    for path, parameter in list(side.named_parameters())[::7]:
        assert parameter.grad is not None
        at = int(parameter.grad.abs().argmax())
        slopes = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.view(-1)[at] += step
                slopes.append(float(value()))
                parameter.view(-1)[at] -= step
        slope = (slopes[0] - slopes[1]) / 2e-5
        assert float(parameter.grad.view(-1)[at]) == pytest.approx(slope, rel=1e-6), path


def test_both_halves_of_a_guided_call_get_their_own_rows_control() -> None:
    world = World("sd15")
    world.stir()
    with torch.no_grad():
        one = world(control=world.control)
        world.inputs = {key: torch.cat([value, value]) for key, value in world.inputs.items()}
        two = world(control=world.control)
    assert torch.allclose(two, torch.cat([one, one]), rtol=1e-6, atol=1e-9)


def test_without_latents_it_sees_the_control_alone() -> None:
    world = World("sd15", sees_latents=False)
    world.stir()
    assert world.side.config.latents == 0 and world.side.enter.in_channels == 2 * 64
    with torch.no_grad():
        first, plain = world(control=world.control), world()
        assert not torch.allclose(first, plain, rtol=1e-4)


def test_its_start_is_a_function_of_seed_and_names() -> None:
    first, other = World("sd15").side, World("sd15", seed=1).side
    before = torch.get_rng_state()
    again = ControlAdapter(first.config)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        if name.startswith("leave") or name.endswith("bias"):
            assert float(a.abs().max()) == 0
        elif a.ndim > 1:
            assert not torch.equal(a, c) and float(a.std()) == pytest.approx(a[0].numel() ** -0.5, rel=0.15)


def test_the_file_gives_it_back(tmp_path: Path) -> None:
    world, path = World("sdxl"), tmp_path / "control.safetensors"
    world.stir()
    save_adapter(path, world.side, "unet", {"onestep.note": "kept"})
    assert "bit for bit" in check_adapter(path, world.side, "unet")
    loaded = load_adapter(path, {"control": ControlAdapter.from_config}, "unet")
    assert loaded.module.config == world.side.config and loaded.metadata == {"onestep.note": "kept"}
    assert set(read_tensors(path)) == {name for name, _ in world.side.named_parameters()}
    with torch.no_grad():
        wanted = world(control=world.control)
        world.roles.add_module("student", loaded.module)
        assert torch.equal(world(control=world.control), wanted)


def two_videos() -> tuple[Tensor, Tensor]:
    """Of three latent frames, as the entry takes and gives them."""
    return torch.zeros(2, 16, 3, 8, 12), torch.zeros(2, 24, 3, 4, 6)


def test_what_is_refused(tmp_path: Path) -> None:
    world, path = World("sd15"), tmp_path / "control.safetensors"
    save_adapter(path, world.side, "unet")
    with pytest.raises(OneStepError, match="made for 'unet' models, this one is 'sd3'"):
        load_adapter(path, {"control": ControlAdapter.from_config}, "sd3")
    with pytest.raises(OneStepError, match="down_blocks.0.attentions.0.proj_out, which is not in this model"):
        World("sdxl").roles.add_module("student", world.side)
    with torch.no_grad():
        for shape, words in (
            ((2, 2, 64, 32), "32x64 pixels, the picture to draw 64x64"),
            ((2, 2, 60, 60), "60x60 pixels"),
            ((2, 3, 64, 64), r"a mine adapter takes \[B, 2, H, W\]"),
            ((3, 2, 64, 64), "for 2 samples"),
        ):
            with pytest.raises(OneStepError, match=words):
                world(control=torch.zeros(shape))
        video = World("wan")
        with pytest.raises(OneStepError, match="a video of 3 latent frames: draw one frame"):
            video.side.on_output("patch_embedding", *two_videos(), Call(None, None, {"control": video.control}))
        with pytest.raises(OneStepError, match="another size"):
            flux = World("flux")
            flux(control=torch.zeros(2, 2, 64, 96))
    targets = {name: target for name, target in world.roles.targets.items() if ".attn" in name}
    with pytest.raises(OneStepError, match="set targets to all"):
        places_of("unet", targets)


@pytest.mark.parametrize(
    "changes",
    [{"width": 0}, {"width": 10**9}, {"depth": 99}, {"places": []}, {"cell": 1.5}, {"latents": -1}, {"nonsense": 1}],
    ids=str,
)
def test_a_damaged_config_makes_no_adapter(changes: dict[str, Any]) -> None:
    places = [{"name": "conv_in", "channels": 4, "stride": 1}]
    config = {"control": "mine", "channels": 1, "cell": 8, "latents": 4, "places": places, "width": 8, "depth": 1}
    ControlAdapter.from_config(**config)
    with pytest.raises((OneStepError, TypeError)):
        ControlAdapter.from_config(**{**config, **changes})


def test_a_picture_is_fitted() -> None:
    x = torch.rand(1, 1, 96, 48)
    assert fitted(x, (48, 96)) is x and fitted(x, (64, 32)).shape == (1, 1, 32, 64)
    assert torch.allclose(fitted(torch.ones(1, 1, 9, 9), (4, 7)), torch.ones(1, 1, 7, 4))
