"""Guidance adapters on the command line: learnt, described, measured beside the teacher's guidance."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from command import SHORT, Command
from tiny_pipelines import sd

from onestep.core.adapter_file import load_adapter, save_adapter
from onestep.core.control import new_adapter as new_control
from onestep.core.guidance_adapter import MAKERS, new_adapter
from onestep.pipelines.adapt import adapt


def test_an_adapter_is_learnt_described_and_measured(onestep: Command, model: Path, prompts: Path, tmp_path: Path):
    run = tmp_path / "run"
    short = [*SHORT, "--method", "agd", "--set", "states=1", "--set", "guidance=3"]
    said = onestep("distill", model, "--prompts", prompts, "--out", run, *short, "--json")
    told = json.loads(said.out)
    assert said.code == 0 and told["check"].startswith("the adapter reads back")
    file = Path(told["path"])
    assert load_adapter(file, MAKERS, "unet").kind == "guidance-cross-attention"
    assert told["recipe"]["guidance"] == 1 and len(told["recipe"]["timesteps"]) == 2
    said = onestep("inspect", file)
    assert (
        "an adapter (guidance-cross-attention) for the U-Net" in said.out and "load_guidance_adapter(pipe, " in said.out
    )
    facts = json.loads(onestep("inspect", file, "--json").out)
    assert facts["kind"] == "guidance-cross-attention" and facts["settings"]["method"] == "agd"
    said = onestep("evaluate", model, "--prompts", prompts, "--lora", file, "--samples", "4", "--json", "-")
    table = json.loads(said.out)
    rows = {row["name"]: row for row in table["rows"]}
    assert table["about"]["teacher's guidance"] == 3 and rows["result.safetensors"]["forwards"] == 2
    # where a LoRA is wanted, an adapter is refused with a word
    said = onestep("generate", model, "--lora", file, "--prompt", "red wall", "--out", tmp_path / "x.png")
    assert said.code and "holds an adapter, no LoRA:" in said.message


@pytest.mark.parametrize("kind", ["guidance", "control"])
def test_what_inspect_tells_of_an_adapter_loads_it(kind: str, onestep: Command, tmp_path: Path):
    """The node's name, and lines of Python that run."""
    pipe, file = sd(), tmp_path / "x.safetensors"
    host = adapt(pipe, device="cpu")
    targets, size = host.denoiser.roles.targets, (16, 16)
    control = new_control("unet", targets, ("canny", 1), size, host.latent_shape(size))
    host.release()
    save_adapter(file, control if kind == "control" else new_adapter(targets, "unet", 1), "unet")
    before, lines = onestep("inspect", file).out.split("  diffusers:\n")
    assert {"guidance": "Apply Guidance Adapter", "control": "Load Control Adapter"}[kind] in before
    *loading, call = (line.strip() for line in lines.splitlines())
    told: dict[str, Any] = {"pipe": pipe, "onestep": importlib.import_module("onestep")}
    exec("\n".join(["import onestep.pipelines", *loading]), told)
    assert {"guidance": "dial", "control": "fast"}[kind] in told and ("pipe(" in call or "fast(" in call)


def test_a_negative_that_does_nothing_is_said(onestep: Command, model: Path, trained: Path, tmp_path: Path):
    draw = ["generate", model, "--lora", trained / "result.safetensors", "--prompt", "red wall"]
    draw += ["--out", tmp_path / "x.png"]
    for more, said in ((["--negative", "red"], True), (["--negative", "red", "--guidance", "2"], False), ([], False)):
        told = onestep(*draw, *more)
        assert told.code == 0 and ("--negative does nothing here" in told.err) == said
