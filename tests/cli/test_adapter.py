"""Guidance adapters on the command line: learnt, described, measured beside the teacher's guidance."""

from __future__ import annotations

import json
from pathlib import Path

from command import SHORT, Command

from onestep.core.adapter_file import load_adapter
from onestep.core.guidance_adapter import MAKERS


def test_an_adapter_is_learnt_described_and_measured(onestep: Command, model: Path, prompts: Path, tmp_path: Path):
    run = tmp_path / "run"
    short = [*SHORT, "--method", "agd", "--set", "states=1", "--set", "guidance=3"]
    said = onestep("distill", model, "--prompts", prompts, "--out", run, *short, "--json")
    told = json.loads(said.out)
    assert said.code == 0 and told["check"].startswith("the adapter reads back")
    file = Path(told["path"])
    assert load_adapter(file, MAKERS, "unet").kind == "guidance-attention"
    assert told["recipe"]["guidance"] == 1 and len(told["recipe"]["told"]) == 2
    said = onestep("inspect", file)
    assert "an adapter (guidance-attention) for the U-Net" in said.out and "load_guidance_adapter(pipe, " in said.out
    facts = json.loads(onestep("inspect", file, "--json").out)
    assert facts["kind"] == "guidance-attention" and facts["settings"]["method"] == "agd"
    said = onestep("evaluate", model, "--prompts", prompts, "--lora", file, "--samples", "4", "--json", "-")
    table = json.loads(said.out)
    rows = {row["name"]: row for row in table["rows"]}
    assert table["about"]["teacher's guidance"] == 3 and rows["result.safetensors"]["forwards"] == 2
    # where a LoRA is wanted, an adapter is refused with a word
    said = onestep("generate", model, "--lora", file, "--prompt", "red wall", "--out", tmp_path / "x.png")
    assert said.code and "adapter" in said.message
