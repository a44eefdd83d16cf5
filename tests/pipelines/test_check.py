"""A written LoRA is loaded with diffusers' own loader, and a difference is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import narrowed
from safetensors.torch import load_file, save_file
from tiny_pipelines import MAKERS, MODERN, make

from onestep.core.errors import OneStepError
from onestep.core.lora_file import save_lora
from onestep.pipelines.adapt import DiffusersHost, adapt
from onestep.pipelines.check import compare


def written(host: DiffusersHost, path: Path) -> Path:
    host.denoiser.roles.add("student", 3, 0)
    for parameter in host.denoiser.roles.parameters("student"):
        torch.nn.init.normal_(parameter)
    save_lora(path, host.denoiser.roles.state("student"), host.family)
    return path


@pytest.mark.parametrize("name", narrowed([*MAKERS, *MODERN], "sd", "sd3", "flux", "z_image"))
def test_our_file_means_the_same_to_diffusers_and_the_pipeline_stays(name: str, tmp_path: Path) -> None:
    host = adapt(make(name))
    before = [(path, id(module)) for path, module in host.network.named_modules()]
    told = host.check_file(written(host, tmp_path / "x.safetensors"))
    assert f"all {len(host.denoiser.roles.targets)} layers" in told and told.endswith("difference 0")
    assert [(path, id(module)) for path, module in host.network.named_modules()] == before


def changed(path: Path, change: Any) -> Path:
    state = load_file(path)
    change(state)
    save_file(state, path)
    return path


def test_a_file_that_diffusers_refuses_is_said(tmp_path: Path) -> None:
    """SD3's loader knows no `.alpha`; ComfyUI reads it."""
    host = adapt(make("sd3"))
    path = written(host, tmp_path / "x.safetensors")

    def with_alpha(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if key.endswith("lora_A.weight")]:
            state[key.replace("lora_A.weight", "alpha")] = torch.tensor(1.0)

    with pytest.raises(OneStepError) as caught:
        host.check_file(changed(path, with_alpha))
    assert len(str(caught.value)) < 400


def test_a_layer_that_only_one_of_them_reads_is_found() -> None:
    layer = (torch.ones(1, 2), torch.ones(2, 1))
    with pytest.raises(OneStepError, match="1 layers missing, 0 added, the first: b"):
        compare({"a": layer, "b": layer}, {"a": layer}, "x")
    with pytest.raises(OneStepError, match="0 layers missing, 1 added, the first: b"):
        compare({"a": layer}, {"a": layer, "b": layer}, "x")


def test_other_numbers_are_found() -> None:
    a, b = torch.randn(2, 4), torch.randn(3, 2)
    assert compare({"a": (a, b)}, {"a": (a, b)}, "x") == 0
    # the same product of other factors
    assert compare({"a": (a, b)}, {"a": (2 * a, b / 2)}, "x") < 1e-6
    for theirs in ((a, 1.001 * b), (a, 0 * b), (a, float("nan") * b)):
        with pytest.raises(OneStepError, match="other numbers"):
            compare({"a": (a, b)}, {"a": theirs}, "x")


def test_a_file_of_another_base_is_refused(tmp_path: Path) -> None:
    path = written(adapt(make("sdxl")), tmp_path / "x.safetensors")
    with pytest.raises(OneStepError, match="another base|which this model does not have"):
        adapt(make("sd")).check_file(path)


@torch.no_grad()
def test_a_lora_under_the_teacher_is_fused_first(tmp_path: Path) -> None:
    """An attached one is refused with what to do; after that it is part of the base, and of its hash."""
    plain, pipe = adapt(make("sd")), make("sd")
    path = written(plain, tmp_path / "x.safetensors")
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    with pytest.raises(OneStepError, match="fuse_lora"):
        adapt(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = adapt(pipe)
    x, level = torch.randn(1, 4, 8, 8), torch.tensor([0.7], dtype=torch.float64)
    cond = plain.encode(["a"], (16, 16))
    with plain.denoiser.roles.use("student"):
        expected = plain.denoiser(x, level, cond)
    torch.testing.assert_close(fused.denoiser(x, level, cond), expected, rtol=0, atol=1e-3 * float(expected.std()))
    assert fused.base_hash != plain.base_hash
