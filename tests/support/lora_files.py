"""LoRA files for the tests: ours on small networks, and those of others, written by safetensors itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import small_networks as small
import torch
from torch import Tensor, nn

from onestep.core.families import bind_diffusers
from onestep.core.lora_file import save_lora
from onestep.core.recipe import Recipe
from onestep.pipelines.adapt import adapt

State = dict[str, tuple[Tensor, Tensor]]


def case(name: str) -> tuple[nn.Module, Any, State]:
    network = small.network_of(name, torch.float32)
    targets = bind_diffusers(network)
    return network, targets, small.random_state(targets)


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, factors in expected.items():
        assert all(torch.equal(f, e) and f.shape == e.shape for f, e in zip(found[name], factors, strict=True)), name


def assert_same_products(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, (a, b) in expected.items():
        ours, theirs = (up.flatten(1) @ down.flatten(1) for down, up in (found[name], (a, b)))
        torch.testing.assert_close(ours, theirs, msg=name)


def foreign(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A file as others write it: by safetensors' own writer."""
    safetensors.torch.save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path, metadata)
    return path


def factors(rank: int = 4, inputs: int = 8, outputs: int = 8, seed: int = 5) -> tuple[Tensor, Tensor]:
    draw = small.seeded(seed)
    return draw(rank, inputs).float(), draw(outputs, rank).float()


def random_lora(
    pipe: Any, path: Path, recipe: Recipe | None, size: float = 0.3, seed: int = 1, loader: Any = "diffusers"
) -> Path:
    """A file of random adapters on every target. loader: whose it is for, where no one file serves both hosts."""
    host = adapt(pipe)
    host.denoiser.roles.add("student", 2, 0)
    torch.manual_seed(seed)
    for parameter in host.denoiser.roles.parameters("student"):
        torch.nn.init.normal_(parameter, std=size)
    save_lora(path, host.denoiser.roles.state("student"), host.family, recipe and recipe.to_json(), host=loader)
    host.release()
    return path
