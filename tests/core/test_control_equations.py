"""The control adapter's encoder against NumPy, where its features go, and mistakes in either, which must be found."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from narrowed import narrowed
from numpy.typing import NDArray
from small_networks import CASES, network_of

from onestep.core import control as original
from onestep.core.adapter_module import Call
from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.families import bind_diffusers

Array = NDArray[np.float64]
NAME = "onestep.core.control"
CELL, GRID, WIDTH, GROUPS = 4, (4, 6), 24, {24: 8, 48: 16}
PLACES = (("entry", 5, 1), ("fine", 6, 1), ("coarse", 7, 2))


# -- the encoder, by NumPy --------------------------------------------------------------------------------------------


def conv(x: Array, weight: Array, bias: Array, stride: int = 1) -> Array:
    edge = weight.shape[-1] // 2
    x = np.pad(x, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    return np.einsum("bchwij,ocij->bohw", windows, weight) + bias[:, None, None]


def normed(x: Array, weight: Array, bias: Array) -> Array:
    apart = x.reshape(len(x), GROUPS[x.shape[1]], -1)
    apart = (apart - apart.mean(2, keepdims=True)) / np.sqrt(apart.var(2, keepdims=True) + 1e-5)
    return apart.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def block(x: Array, w: dict[str, Array], name: str) -> Array:
    """(h + conv(silu(conv(silu(norm(h)))))) / sqrt(2)"""
    inner = silu(normed(x, w[f"{name}.norm.weight"], w[f"{name}.norm.bias"]))
    inner = silu(conv(inner, w[f"{name}.first.weight"], w[f"{name}.first.bias"]))
    return (x + conv(inner, w[f"{name}.second.weight"], w[f"{name}.second.bias"])) / np.sqrt(2)


def encoded(control: Array, latents: Array, w: dict[str, Array]) -> list[Array]:
    """F_i(c, x): the picture's cells in [-1, 1] with the latents of each, two blocks, half the size, two blocks."""
    rows, columns = GRID
    cells = (2 * control - 1).reshape(len(control), 2, rows, CELL, columns, CELL)
    cells = cells.transpose(0, 1, 3, 5, 2, 4).reshape(len(control), -1, rows, columns)
    x = conv(np.concatenate([cells, latents], 1), w["enter.weight"], w["enter.bias"])
    fine = block(block(x, w, "blocks.0.0"), w, "blocks.0.1")
    coarse = conv(fine, w["finer.0.weight"], w["finer.0.bias"], 2)
    coarse = block(block(coarse, w, "blocks.1.0"), w, "blocks.1.1")
    levels = (fine, fine, coarse)
    return [conv(level, w[f"leave.{at}.weight"], w[f"leave.{at}.bias"]) for at, level in enumerate(levels)]


def adapter_of(module: ModuleType) -> tuple[Any, dict[str, Array]]:
    """An adapter whose every weight is away from its start, and its weights."""
    places = tuple(module.Place(*place) for place in PLACES)
    adapter = module.ControlAdapter(module.ControlConfig("mine", 2, CELL, 3, places, WIDTH)).double()
    draw = torch.Generator().manual_seed(4)
    for _, value in sorted(adapter.named_parameters()):
        noise = torch.randn(value.shape, generator=draw, dtype=torch.float64)
        value.data = (1 if value.ndim == 1 else 0) + noise / max(value[0].numel(), 4) ** 0.5
    return adapter, {name: value.detach().numpy() for name, value in adapter.named_parameters()}


def given(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    control = torch.rand(2, 2, CELL * GRID[0], CELL * GRID[1], generator=draw, dtype=torch.float64)
    return control, torch.randn(rows, 3, *GRID, generator=draw, dtype=torch.float64)


def close(found: torch.Tensor, wanted: Array) -> None:
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def check_given(module: ModuleType, strength: float | None, flat: bool) -> None:
    """Each layer gives strength * F_i more; 4 rows of 2 controls, as guidance's halves are; pictures or tokens."""
    adapter, weights = adapter_of(module)
    control, latents = given(4)
    features = encoded(np.concatenate([control.numpy()] * 2), latents.numpy(), weights)
    told = {"control": control} | ({} if strength is None else {"strength": strength})
    call = Call(torch.zeros(4), Cond(torch.zeros(4, 1, 1)), told)
    for (name, *_), feature in zip(PLACES, features, strict=True):
        x, output, wanted = latents, torch.ones(feature.shape, dtype=torch.float64), feature
        if flat:
            x, output, wanted = x.flatten(2).mT, output.flatten(2).mT, feature.reshape(*feature.shape[:2], -1)
            wanted = wanted.transpose(0, 2, 1)
        assert adapter.on_input(name, x, call) is x
        close(adapter.on_output(name, x, output, call), 1 + (1.0 if strength is None else strength) * wanted)
    silent = Call(call.time, call.cond)
    assert adapter.on_output("fine", x, output, silent) is output


@torch.no_grad()
def check_encoder(module: ModuleType) -> None:
    adapter, weights = adapter_of(module)
    control, latents = given(2)
    for found, wanted in zip(
        adapter(control, latents), encoded(control.numpy(), latents.numpy(), weights), strict=True
    ):
        close(found, wanted)


# -- where it is put, and how it begins -------------------------------------------------------------------------------


def check_new(module: ModuleType) -> None:
    """By hand from diffusers' layouts: 8 x 8 latents of pictures of 64 pixels, cells of one latent or of 2 x 2."""
    for name, cell, channels, strides in (
        ("sdxl", 8, 4, (1, 1, 1, 2, 2, 4, 4, 4)),
        ("sd3", 16, 64, (1,)),
        ("flux", 16, 64, (1,)),
    ):
        targets = {target.name: target for target in bind_diffusers(network_of(name))}
        latents = 4 if name == "sdxl" else 16
        adapter = module.new_adapter(CASES[name].family, targets, ("mine", 1), (64, 64), (latents, 8, 8))
        config = adapter.config
        assert (config.cell, config.latents) == (cell, channels)
        assert tuple(place.stride for place in config.places) == strides
        for path, value in adapter.named_parameters():
            zero = path.startswith("leave") or path.endswith("bias")
            assert not value.any() if zero else value.any()
            if value.ndim > 1 and not zero:
                assert abs(float(value.detach().std()) * value[0].numel() ** 0.5 - 1) < 0.15
        module.check_fit(adapter, targets)
        wider = module.Place(config.places[0].name, config.places[0].channels + 1, 1)
        foreign = module.ControlAdapter(module.ControlConfig("mine", 1, cell, channels, (wider,), 8))
        refused(lambda foreign=foreign, targets=targets: module.check_fit(foreign, targets))


def refused(action: Any) -> None:
    try:
        action()
    except OneStepError:
        return
    raise AssertionError("it was not refused")


def check_sizes(module: ModuleType) -> None:
    """A picture shrinks to the mean of what a pixel covers; one that does not fit the grid is refused."""
    stripes = torch.tensor([0.0, 0.0, 0.0, 1.0]).repeat(8).expand(1, 1, 8, 32)
    small = module.fitted(stripes, (8, 4))
    assert small.shape == (1, 1, 4, 8) and float((small[..., 1:-1] - 0.25).abs().max()) < 0.05
    adapter, _ = adapter_of(module)
    for size in ((18, 24), (16, 26), (24, 16), (16, 20)):
        output = torch.ones(2, 5, *GRID)
        refused(lambda size=size, output=output: module.grid_of(adapter.config, torch.zeros(2, 2, *size), output))
    refused(lambda: module.grid_of(adapter.config, torch.zeros(3, 2, 16, 24), torch.ones(4, 5, *GRID)))
    refused(lambda: module.grid_of(adapter.config, torch.zeros(2, 1, 16, 24), torch.ones(4, 5, *GRID)))


def check_all(module: ModuleType) -> None:
    check_encoder(module)
    for flat in (False, True):
        check_given(module, None, flat)
        check_given(module, 0.5, flat)
    check_new(module)
    check_sizes(module)


def test_it_is_its_equation() -> None:
    check_all(original)


MUTANTS = {
    "a control in [0, 1]": ("2 * control.to(own) - 1", "control.to(own)"),
    "latents first": ("[cells, latents.to(own)]", "[latents.to(own), cells]"),
    "blocks on the finest grid alone": (
        "blocks(self.finer[at - 1](x) if at else x)",
        "self.finer[at - 1](x) if at else blocks(x)",
    ),
    "a block twice as small": ("/ 2**0.5", "/ 2"),
    "no stream": ("(h + self.second", "(self.second"),
    "one silu": ("silu(self.first(silu(self.norm(h))))", "self.first(silu(self.norm(h)))"),
    "no norm": ("silu(self.norm(h))", "silu(h)"),
    "other groups": ("for g in (32, 16,", "for g in (1, 16,"),
    "no strength": ('call.inputs.get("strength", 1.0)', "1.0"),
    "off by default": ('"strength", 1.0', '"strength", 0.0'),
    "taken away": ("output + (feature", "output - (feature"),
    "columns first": ("picture.flatten(2)", "picture.mT.flatten(2)"),
    "each control for its neighbours": (
        "control.repeat(len(output) // len(control), 1, 1, 1)",
        "control.repeat_interleave(len(output) // len(control), 0)",
    ),
    "the grid turned": ("unflatten(2, grid)", "unflatten(2, grid[::-1])"),
    "a start that acts": (' and not name.startswith("leave")', ""),
    "a start too large": ("drawn / value[0].numel() ** 0.5", "drawn"),
    "strides that add": ("2**i for i, j", "2 ** max(i - 1, 0) for i, j"),
    "the middle too fine": ("2 ** blocks[-1][0]", "2 ** blocks[-1][1]"),
    "a cell of one latent": ("patch * (size[1] // shape[1])", "size[1] // shape[1]"),
    "half a cell's latents": ("shape[0] * patch**2", "shape[0] * patch"),
    "any width": ("if found != place.channels:", "if found is None:"),
    "pixels that are left out": ("antialias=True", "antialias=False"),
    "a size turned": ("interpolate(control, size[::-1]", "interpolate(control, size"),
    "a cell cut": ("height % cell or width % cell or cells", "cells"),
    "another size": ("cells not in (grid, (grid[0] * grid[1],))", "False"),
    "rows that do not divide": (" or len(output) % max(len(control), 1)", ""),
    "channels of another control": ("control.shape[1] != channels or ", ""),
}


@pytest.mark.parametrize("mistake", narrowed(MUTANTS, *list(MUTANTS)[::3]))
def test_a_mistake_is_found_out(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    must_fail(check_all, mutant(NAME, *MUTANTS[mistake], monkeypatch))
