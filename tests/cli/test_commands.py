"""The commands themselves: what they write, what they say, and where they say it."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_folders
import torch
from command import SHORT, Command
from PIL import Image

from onestep.cli.inspect import in_comfyui
from onestep.core.families import FAMILIES
from onestep.core.ksampler import core_nodes
from onestep.core.lora_file import load_lora, save_lora
from onestep.core.recipe import recipe_of
from onestep.core.schedule import FlowSchedule
from onestep.pipelines.load import load

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals and file limits of POSIX")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


# -- distill ----------------------------------------------------------------------------------------------------------


def test_distill_says_where_the_lora_is_and_json_is_alone(onestep: Command, model, prompts, tmp_path):
    run = tmp_path / "run"
    said = onestep("distill", model, "--prompts", prompts, "--out", run, *SHORT, "--json")
    told = json.loads(said.out)
    assert said.code == 0 and said.message == ""
    assert Path(told["path"]) == run / "result.safetensors" and told["updates"] == 1
    assert [line["update"] for line in told["curve"]] == [0, 1]
    assert load_lora(told["path"]).recipe is not None
    # a bar is for terminals: here there are lines
    assert "\r" not in said.err and "update 1/1, regression: distance" in said.err
    assert re.search(r"update 0/1, before training: distance [^;]*; measuring the time to go", said.err)


def test_a_run_takes_the_models_own_size(trained):
    assert json.loads((trained / "config.json").read_text())["settings"]["sizes"] == "32x32"


def test_resume_says_when_it_starts_anew(onestep: Command, model, prompts, trained, tmp_path):
    run = tmp_path / "run"
    first = onestep("distill", model, "--prompts", prompts, "--out", run, *SHORT, "--resume")
    assert first.code == 0 and "started anew" in first.err
    made = (run / "result.safetensors").read_bytes()
    again = onestep("distill", model, "--prompts", prompts, "--out", run, *SHORT, "--resume")
    assert again.code == 0 and "started anew" not in again.err
    assert (run / "result.safetensors").read_bytes() == made
    assert onestep("distill", model, "--prompts", prompts, "--out", run, *SHORT, "--restart").code == 0
    assert load_lora(run / "result.safetensors").state.keys() == load_lora(trained / "result.safetensors").state.keys()


def interrupt_when(path: Path, lines: int) -> None:
    """Send this process Ctrl-C as soon as ``path`` has so many lines."""

    def wait() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if path.is_file() and path.read_bytes().count(b"\n") >= lines:
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.01)

    threading.Thread(target=wait, daemon=True).start()


@POSIX
def test_ctrl_c_keeps_what_was_learnt_and_the_run_goes_on(onestep: Command, model, prompts, tmp_path):
    run, before = tmp_path / "run", signal.getsignal(signal.SIGINT)
    many = [*SHORT[:3], "100000", *SHORT[4:]]
    words = ["distill", model, "--prompts", prompts, "--out", run, *many, "--set", "watch_every=0"]
    interrupt_when(run / "metrics.jsonl", 3)
    said = onestep(*words)
    assert said.code == 1 and said.out == "" and "--resume" in said.message
    assert signal.getsignal(signal.SIGINT) == before
    partial = load_lora(run / "partial.safetensors")
    assert any(bool(b.any()) for _, b in partial.state.values())
    done = max(int(path.name.removeprefix("state-")) for path in run.glob("state-*"))
    assert done >= 3 and f"after {done} updates" in said.message
    interrupt_when(run / "metrics.jsonl", done + 2)
    again = onestep(*words, "--resume")
    assert again.code == 1 and max(int(path.name.removeprefix("state-")) for path in run.glob("state-*")) > done


@pytest.mark.broad
@POSIX
def test_a_full_disk_ends_the_run_in_one_line(onestep: Command, model, prompts, trained, tmp_path):
    """A limit on the size of files stands in for the disk: the write of a state breaks off half way."""
    import resource

    run, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        said = onestep("distill", model, "--prompts", prompts, "--out", run, *SHORT)
        drawn = onestep(
            "generate", model, "--prompt", "red", "--steps", 1, "--size", "512x512", "--out", tmp_path / "a.png"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said.code in (1, 2) and said.out == "" and 20 < len(said.message) < 390
    assert not list(run.glob("*.safetensors")) and not list(run.glob("state-*")) and not list(run.rglob("*.tmp"))
    assert drawn.code == 2 and "Cannot write" in drawn.message and [path.name for path in tmp_path.iterdir()] == ["run"]
    # with room again it is a run like any other
    assert onestep("distill", model, "--prompts", prompts, "--out", run, *SHORT, "--resume").code == 0


def test_a_missing_folder_on_the_way_is_made(onestep: Command, model, prompts, tmp_path):
    run = tmp_path / "runs" / "today" / "first"
    assert onestep("distill", model, "--prompts", prompts, "--out", run, *SHORT).code == 0


# -- generate ---------------------------------------------------------------------------------------------------------


def test_the_model_draws_what_diffusers_draws(onestep: Command, model, tmp_path):
    out = tmp_path / "a.png"
    draw = ["generate", model, "--prompt", "red dragon", "--seed", 7, "--steps", 5, "--guidance", 3, "--out", out]
    said = onestep(*draw, "--json")
    assert said.code == 0 and json.loads(said.out)["steps"] == 5
    pipe = load(model)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    wanted = pipe("red dragon", num_inference_steps=5, guidance_scale=3.0, generator=generator).images[0]
    assert np.abs(pixels(out) - np.asarray(wanted).astype(int)).max() <= 1


def test_each_prompt_has_a_seed_and_a_place_of_its_own(onestep: Command, model, trained, tmp_path):
    draw = ["generate", model, "--lora", trained / "result.safetensors"]
    both, second = tmp_path / "both.png", tmp_path / "second.png"
    assert onestep(*draw, "--prompt", "red wall", "blue wall", "--seed", 3, "--out", both).code == 0
    assert onestep(*draw, "--prompt", "blue wall", "--seed", 4, "--out", second).code == 0
    assert pixels(second).shape == (32, 32, 3) and pixels(both).shape == (32, 66, 3)
    assert np.abs(pixels(both)[:, 34:] - pixels(second)).max() <= 1


def test_steps_and_size_may_be_others_than_the_recipes(onestep: Command, model, trained, tmp_path):
    out = tmp_path / "a.png"
    draw = ["generate", model, "--lora", trained / "result.safetensors", "--prompt", "red", "--out", out, "--json"]
    told = json.loads(onestep(*draw).out)
    assert told["steps"] == 1 and told["size"] == [32, 32]
    told = json.loads(onestep(*draw, "--steps", 4, "--size", "48x40").out)
    assert told["steps"] == 4 and Image.open(out).size == (48, 40)


# -- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluate_has_the_floors_and_every_lora(onestep: Command, model, prompts, trained, tmp_path):
    lora, out = trained / "result.safetensors", tmp_path / "table.json"
    real = tmp_path / "real.npz"
    np.savez(real, image=np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8))
    ask = ["evaluate", model, "--lora", lora, "--lora", lora, "--prompts", prompts, "--samples", 8]
    said = onestep(*ask, "--teacher-steps", 2, "--reference", real, "--json", out)
    assert said.code == 0 and said.message == ""
    told = json.loads(out.read_text())
    names = [row["name"] for row in told["rows"]]
    assert names[:3] == ["teacher, 2 steps", "teacher, 1 step", "teacher, 2 steps, another seed"]
    assert names[3:] == ["result.safetensors (1)", "result.safetensors (2)"]
    assert all(name in said.out for name in names)
    assert told["about"]["judge"] is False and told["about"]["teacher's guidance"] == 4.0
    assert set(told["rows"][3]["measures"]) == {"sliced", "sliced_real", "variety"}


def test_evaluate_writes_json_alone_where_it_is_asked_to(onestep: Command, model, prompts):
    ask = ["evaluate", model, "--prompts", prompts, "--samples", 4, "--teacher-steps", 2]
    assert len(json.loads(onestep(*ask, "--json", "-").out)["rows"]) == 3


# -- the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["methods"], ["doctor"]])
def test_json_is_alone_and_text_is_for_people(words, onestep: Command):
    told = json.loads(onestep(*words, "--json").out)
    said = onestep(*words)
    assert said.code == 0 and not said.out.startswith(("{", "["))
    assert told


def test_doctor_tells_why_something_does_not_work(onestep: Command, monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    told = json.loads(onestep("doctor", "--json").out)
    assert told["attention"]["sdpa"] == "works" and told["attention"]["reference"] == "works"
    assert told["packages"]["torch"] == torch.__version__
    assert told["comfyui"][0] == {"folder": str(tmp_path), "version": None, "pack": "no ComfyUI is here"}
    assert told["devices"][0]["name"] == "cpu" and told["free_disk_bytes"] > 0


@pytest.mark.parametrize(
    ("found", "good"),
    [("2.6.0", True), ("2.6.0+cu124", True), ("2.13.0+cpu", True), ("2.10.0a0+git1", True), ("3.0.0", True)]
    + [("2.5.1", False), ("2.5.1+cu121", False), ("1.13.1", False), ("2.0.1+cpu", False)],
)
def test_doctor_tells_a_torch_that_is_too_old(onestep: Command, monkeypatch, found: str, good: bool):
    monkeypatch.setattr(torch, "__version__", found)
    told = json.loads(onestep("doctor", "--json").out)["torch"]
    assert (told is None) == good
    said = onestep("doctor").out
    assert ("too old: OneStep needs torch 2.6 or newer" in said) != good


def test_inspect_tells_how_to_sample(onestep: Command, trained):
    told = json.loads(onestep("inspect", trained / "result.safetensors", "--json").out)
    assert told["family"] == "unet" and told["ranks"] == [2] and told["recipe"]["timesteps"] == [999.0]
    widgets = {"steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    assert told["comfyui"]["simple"] == widgets and not told["comfyui"]["reason"]
    said = onestep("inspect", trained / "result.safetensors").out
    assert "LoraLoader, then KSampler with steps 1, cfg 1, " in said
    assert "usage hint: The LoRA draws in 1 step. In ComfyUI, with its own nodes: LoraLoaderModelOnly, then KS" in said
    assert "pipe.load_lora_weights" in said and "ss_network_dim: 2" in said


def test_inspect_says_what_a_public_file_is_taken_for(onestep: Command, trained, tmp_path):
    """And generate draws by it; by what is given instead; and by nothing where the name does not decide."""
    state = load_lora(trained / "result.safetensors").state
    file, both = tmp_path / "sdxl_lightning_2step_lora.safetensors", tmp_path / "hyper_lightning_2step.safetensors"
    for path in (file, both):
        save_lora(path, state, "unet")
    told = json.loads(onestep("inspect", file, "--json").out)
    assert told["taken_for"] == {"preset": "sdxl-lightning-2", "evidence": "its name"}
    assert told["recipe"]["timesteps"] == [999.0, 499.0] and told["comfyui"]["simple"]["steps"] == 2
    said = onestep("inspect", file).out
    assert "taken for sdxl-lightning-2, by its name (--recipe says otherwise):\n  draws in 2 step(s)" in said
    said = onestep("inspect", both).out
    assert "does not say how it is sampled: hyper_lightning_2step.safetensors may be one of sdxl-lightning-2" in said


@pytest.mark.parametrize("preset", ["wan2.1-lightx2v-4", "qwen-image-lightning-4", "krea2-turbo-8", "hyper-sd3-4-cfg"])
def test_inspect_tells_the_shift_that_a_base_has_not_by_itself(preset: str):
    """Core's "simple" follows the MODEL's: Wan's own, 8, has other levels than LightX2V's, of 5."""
    recipe = recipe_of(preset)
    usual = FAMILIES[recipe.family].schedule.shift
    said, own = in_comfyui(recipe), core_nodes(recipe, FlowSchedule(usual))
    assert ("ModelSampling" in said["words"]) == (str(own) != str(core_nodes(recipe, FlowSchedule(recipe.shift))))
    assert (f"on a MODEL of shift {recipe.shift:g}: " in said["words"]) == (preset.startswith(("wan", "qwen")))


@pytest.mark.parametrize("layout", ["unet", "sd3"])
def test_the_lines_that_inspect_prints_draw_what_generate_draws(layout: str, onestep: Command, prompts, tmp_path):
    """SD3 without T5 too, where diffusers by itself would append zeros."""
    model = getattr(tiny_folders, f"{layout}_folder")(tmp_path / "model")
    assert onestep("distill", model, "--prompts", prompts, "--out", tmp_path / "run", *SHORT).code == 0
    lora, out = tmp_path / "run" / "result.safetensors", tmp_path / "a.png"
    draw = ["generate", model, "--lora", lora, "--prompt", "red dragon", "--seed", 7, "--out", out]
    assert onestep(*draw).code == 0
    *lines, call = json.loads(onestep("inspect", lora, "--json").out)["diffusers"]
    names = {"diffusers": diffusers, "pipe": load(model), "seven": torch.Generator().manual_seed(7)}
    names["pipe"].set_progress_bar_config(disable=True)
    exec("\n".join(lines), names)
    wanted = eval(call.replace("your prompt", "red dragon").removesuffix(")") + ", generator=seven)", names).images[0]
    assert np.abs(pixels(out) - np.asarray(wanted).astype(int)).max() <= 1


def test_help_is_read_from_the_settings(onestep: Command):
    from onestep.training.methods import METHODS
    from onestep.training.settings import Settings, described

    told = " ".join(onestep("distill", "--help").out.split())
    for kind in (Settings, *(method.settings for method in METHODS.values())):
        for entry in described(kind):
            assert f"{entry.name} {entry.metadata['help']}"[:60] in told


def test_without_a_command_it_helps(onestep: Command):
    said = onestep()
    assert said.code == 0 and "distill" in said.out


def test_a_mistyped_word_needs_no_torch():
    """Half a minute of imports is too long for it. The checkout is imported in a process of its own."""
    import subprocess

    root = Path(__file__).resolve().parents[2]
    script = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('onestep', sys.argv[1],"
        " submodule_search_locations=[sys.argv[2]]); m = importlib.util.module_from_spec(spec);"
        " sys.modules['onestep'] = m; spec.loader.exec_module(m); from onestep.cli.main import main;"
        " assert main(['generate', '--help']) == 0; assert main(['distil']) == 2; assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", script, str(root / "__init__.py"), str(root)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def test_debug_shows_the_trace(onestep: Command, model, tmp_path):
    draw = ["generate", model, "--prompt", "red", "--out", tmp_path / "a.jpg"]
    assert "Traceback" not in onestep(*draw).err
    said = onestep(*draw, "--debug")
    assert said.code == 2 and "Traceback" in said.err


def test_headers_broken_anywhere_end_in_one_line(onestep: Command, trained, tmp_path):
    """Forty files with a few bytes of the header changed, by a fixed seed: read or refused, never a trace."""
    good = (trained / "result.safetensors").read_bytes()
    length, draw = int.from_bytes(good[:8], "little"), np.random.default_rng(0)
    codes = []
    for _ in range(40):
        bad = bytearray(good)
        for at in draw.integers(0, 8 + length, draw.integers(1, 9)):
            bad[at] = draw.integers(0, 256)
        file = tmp_path / "bad.safetensors"
        file.write_bytes(bytes(bad))
        said = onestep("inspect", file)
        codes.append(said.code)
        assert said.code in (0, 2) and len(said.message) < 390
    assert codes.count(2) > 30


def test_distill_takes_seed_and_size_by_name(onestep: Command, model, prompts, tmp_path):
    """As generate and evaluate do."""
    run = tmp_path / "run"
    said = onestep("distill", model, "--prompts", prompts, "--out", run, *SHORT, "--seed", "7", "--size", "16x16,24x16")
    assert said.code == 0, said.err
    settings = json.loads((run / "config.json").read_text())["settings"]
    assert (settings["seed"], settings["sizes"]) == (7, "16x16,24x16")
    said = onestep("distill", model, "--prompts", prompts, "--out", tmp_path / "no", "--seed", "x")
    assert said.code == 2 and "seed is 'x': it must be a whole number" in said.err
