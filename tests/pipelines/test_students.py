"""Several students and their router: OneStepPipeline and `onestep generate` draw each prompt with its own."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import random_lora
from narrowed import narrowed
from tiny_pipelines import make

from onestep.cli.generate import draw, students_of
from onestep.cli.lora import read_lora
from onestep.core.errors import OneStepError
from onestep.core.lora_file import load_lora, save_lora
from onestep.core.recipe import Recipe
from onestep.core.router import Router, save_router
from onestep.pipelines.adapt import adapt
from onestep.pipelines.one_step import OneStepPipeline
from onestep.training.evaluation.evaluate import Student

PROMPTS = ["a cat", "red dog", "a cat"]
CALL: dict[str, Any] = {"width": 16, "height": 16, "output_type": "latent", "seed": 1}
RECIPES = {"sd": Recipe((999.0,)), "flux": Recipe((1000.0,), family="flux")}


def students(name: str, folder: Path) -> tuple[Path, list[Path], list[int]]:
    """A router's file, its students' and which of them draws each of PROMPTS."""
    files = [folder / "made.safetensors", folder / "made-2.safetensors"]
    for at, file in enumerate(files):
        drawn = load_lora(random_lora(make(name), folder / "drawn.safetensors", None))
        state = {layer: (a, (at + 1) * b.roll(at, 0)) for layer, (a, b) in drawn.state.items()}
        save_lora(file, state, drawn.family, RECIPES[name].to_json())
    cond = adapt(make(name)).encode(PROMPTS[:2], (16, 16))
    path = folder / "made-router.safetensors"
    save_router(path, Router(cond.summary.float().flip(0)), [file.name for file in files], name)
    return path, files, [1, 0, 1]


@pytest.mark.parametrize("name", narrowed(RECIPES, "sd"))
def test_each_prompt_is_drawn_by_its_student(name: str, tmp_path: Path) -> None:
    path, files, of = students(name, tmp_path)
    pipe = OneStepPipeline.from_pipe(make(name))
    assert pipe.load_one_step_lora(path) == RECIPES[name]
    found = [pipe(prompt, **CALL).images for prompt in PROMPTS]
    assert torch.equal(found[0], found[2])
    for prompt, picture, at in zip(PROMPTS, found, of, strict=True):
        one, other = (OneStepPipeline.from_pipe(make(name)) for _ in range(2))
        one.load_one_step_lora(files[at])
        other.load_one_step_lora(files[1 - at])
        assert torch.equal(one(prompt, **CALL).images, picture)
        assert not torch.allclose(other(prompt, **CALL).images, picture, atol=1e-3)
    # several pictures of one prompt are one student's; of two students' prompts the call is refused
    assert pipe("a cat", num_images_per_prompt=2, **CALL).images.shape[0] == 2
    with pytest.raises(OneStepError, match="are of the students 2, 1: give each prompt its own call"):
        pipe(PROMPTS[:2], **CALL)
    with pytest.raises(OneStepError, match="a LoRA for each of 2 students cannot be: .* or that of one student"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.unload_lora_weights()
    plain = OneStepPipeline.from_pipe(make(name))
    recipe = RECIPES[name]
    assert torch.equal(pipe("a cat", recipe=recipe, **CALL).images, plain("a cat", recipe=recipe, **CALL).images)


@pytest.mark.parametrize("name", narrowed(RECIPES, "sd"))
def test_the_command_draws_with_it_too(name: str, tmp_path: Path) -> None:
    path, files, of = students(name, tmp_path)
    told = Namespace(negative="", guidance=None, steps=None, seed=3, size="16x16")

    def drawn(file: Path) -> torch.Tensor:
        host = adapt(make(name))
        lora = read_lora(str(file), host)
        with host.denoiser.roles.installed():
            return draw(host, PROMPTS, lora, told, (16, 16))[0]

    found, alone = drawn(path), [drawn(file) for file in files]
    for row, at in enumerate(of):
        assert torch.equal(found[row], alone[at][row]) and not torch.equal(found[row], alone[1 - at][row])
    lora = read_lora(str(path), adapt(make(name)))
    assert students_of(adapt(make(name)), PROMPTS, lora, (16, 16)) == [files[at].name for at in of]
    assert lora.name == "made.safetensors" and len(lora.later) == 1 and isinstance(lora.parts, Router)
    # what is measured is drawn so too
    assert Student("both", lora.state, lora.recipe, later=lora.later, router=lora.router).router is lora.router


def test_a_router_of_another_base_is_refused(tmp_path: Path) -> None:
    path, _, _ = students("sd", tmp_path)
    with pytest.raises(OneStepError):
        OneStepPipeline.from_pipe(make("flux")).load_one_step_lora(path)
    (tmp_path / "made-2.safetensors").unlink()
    with pytest.raises(OneStepError, match="made-2"):
        OneStepPipeline.from_pipe(make("sd")).load_one_step_lora(path)
