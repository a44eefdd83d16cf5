"""Bad input: exit code 2, one message with the value found and what to do, and nothing written."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import tiny_folders
import torch
from command import SHORT, Command, Said
from narrowed import narrowed


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a command would write."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def refused(said: Said, place: Path, *words: str) -> None:
    """The contract of every bad input."""
    assert said.code == 2, said
    assert said.out == ""
    assert 20 < len(said.message) < 390
    assert "Traceback" not in said.err and "\r" not in said.err
    for word in words:
        assert word in said.message, said.message
    assert list(place.iterdir()) == []


# -- files ------------------------------------------------------------------------------------------------------------


def no_safetensors(path: Path, good: Path) -> None:
    path.write_text("this is a letter to my aunt, no model at all")


def truncated(path: Path, good: Path) -> None:
    path.write_bytes(good.read_bytes()[:-1000])


def pickled(path: Path, good: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": [1, 2, 3]}, protocol=2))


def empty(path: Path, good: Path) -> None:
    path.write_bytes(b"")


def no_lora(path: Path, good: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)


def not_a_number(path: Path, good: Path) -> None:
    tensors = safetensors.torch.load_file(good)
    tensors[min(name for name in tensors if "down" in name)].view(-1)[0] = float("nan")
    safetensors.torch.save_file(tensors, path)


FILES = {
    no_safetensors: "sound .safetensors",
    truncated: "cut off",
    pickled: "pickle",
    empty: "0 bytes",
    no_lora: "weight",
    not_a_number: "not finite",
}


@pytest.mark.parametrize("damage", FILES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("command", narrowed(["generate", "inspect", "evaluate", "distill"], "generate", "inspect"))
def test_a_broken_lora(command, damage, onestep: Command, model, prompts, trained, place, tmp_path):
    file = tmp_path / "bad.safetensors"
    damage(file, trained / "result.safetensors")
    words = {
        "generate": ["generate", model, "--lora", file, "--prompt", "red", "--out", place / "a.png"],
        "inspect": ["inspect", file],
        "evaluate": ["evaluate", model, "--lora", file, "--prompts", prompts, "--json", place / "a.json"],
        "distill": ["distill", model, "--prompts", prompts, "--out", place / "run", "--set", f"initial_lora={file}"],
    }
    refused(onestep(*words[command]), place, FILES[damage])


@pytest.mark.parametrize("damage", [no_safetensors, truncated, pickled, empty, no_lora], ids=lambda f: f.__name__)
def test_a_broken_checkpoint(damage, onestep: Command, trained, place, tmp_path):
    file = tmp_path / "bad.safetensors"
    damage(file, trained / "result.safetensors")
    refused(onestep("generate", file, "--prompt", "red", "--out", place / "a.png"), place)


def test_a_pickle_by_name(onestep: Command, prompts, place, tmp_path):
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"PK\x03\x04 whatever is inside")
    refused(onestep("distill", file, "--prompts", prompts, "--out", place / "run"), place, "pickle", "safetensors")


def test_a_checkpoint_that_is_not_there(onestep: Command, prompts, place):
    said = onestep("distill", "tinny", "--prompts", prompts, "--out", place / "run")
    refused(said, place, "tinny", "tiny-flow")


def test_a_pipeline_of_another_architecture(onestep: Command, prompts, place, tmp_path):
    folder = tmp_path / "video"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "LTXPipeline"}))
    refused(onestep("distill", folder, "--prompts", prompts, "--out", place / "run"), place, "LTXPipeline", "SDXL")


def test_weights_that_are_no_numbers(onestep: Command, model, prompts, place, tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(model, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["conv_in.weight"][0] = float("nan")
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    refused(onestep("distill", folder, "--prompts", prompts, "--out", place / "run"), place, "conv_in", "finite")


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same family, other widths."""
    return tiny_folders.unet_folder(tmp_path_factory.mktemp("other") / "tiny", widths=(32, 64))


@pytest.fixture(scope="module")
def other_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folders.sd3_folder(tmp_path_factory.mktemp("flow") / "tiny-flow")


@pytest.mark.parametrize("base, words", [("other_model", "another base"), ("other_family", "LoRA for")])
def test_a_lora_of_another_base(base, words, onestep: Command, prompts, trained, place, request):
    other, lora = request.getfixturevalue(base), trained / "result.safetensors"
    refused(onestep("generate", other, "--lora", lora, "--prompt", "a", "--out", place / "a.png"), place, words)
    said = onestep("evaluate", other, "--lora", lora, "--prompts", prompts, "--json", place / "a.json")
    refused(said, place, words)
    run = ["distill", other, "--prompts", prompts, "--out", place / "run", "--set", f"initial_lora={lora}"]
    refused(onestep(*run), place, words)


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "no prompt"),
        (b"\n \n\t\n", "no prompt"),
        (b"red\n" + b"x" * 10_000, "10000 characters"),
        (b"\xff\xfe\x00\x01red", "UTF-8"),
        (b"PK\x03\x04\xff\xff\xff", "UTF-8"),
    ],
    ids=["empty", "blank", "long", "utf-16", "zip"],
)
def test_bad_prompt_files(content, words, onestep: Command, model, place, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    refused(onestep("distill", model, "--prompts", file, "--out", place / "run"), place, words)
    refused(onestep("evaluate", model, "--prompts", file, "--json", place / "a.json"), place, words)


def test_prompts_that_are_not_there(onestep: Command, model, place):
    refused(onestep("distill", model, "--prompts", "nowhere.txt", "--out", place / "run"), place, "nowhere.txt")
    refused(onestep("distill", model, "--out", place / "run"), place, "--prompts")
    refused(onestep("generate", model, "--out", place / "a.png"), place, "--prompt")


@pytest.mark.parametrize("prompt, words", [("", "empty"), ("  ", "empty"), ("x" * 10_000, "10000 characters")])
def test_bad_prompts_of_generate(prompt, words, onestep: Command, model, place):
    refused(onestep("generate", model, "--prompt", "red", prompt, "--out", place / "a.png"), place, "prompt 2", words)


# -- numbers and names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, words",
    [
        ("rank=0", "rank is 0"),
        ("rank=many", "'many'"),
        ("rank=3.5", "'3.5'"),
        ("learning_rate=nan", "nan"),
        ("sizes=100x100", "multiples of 8"),
        ("sizes=big", "'big'"),
        ("sizes=16x12", "multiples of 8"),
        ("rnk=4", "did you mean 'rank'"),
        ("learning_rte=1", "did you mean 'learning_rate'"),
        ("rank", "no '='"),
        ("method=dmdd", "did you mean 'dmd'"),
        ("targets=everything", "attention"),
        ("batch=-1", "batch is -1"),
    ],
)
def test_bad_settings(setting, words, onestep: Command, model, prompts, place):
    said = onestep("distill", model, "--prompts", prompts, "--out", place / "run", "--set", setting)
    refused(said, place, words)


@pytest.mark.parametrize(
    "option, value, words",
    [
        ("--method", "regresion", "did you mean 'regression'"),
        ("--preset", "Balancd", "did you mean 'Balanced'"),
        ("--steps", "-3", "steps is -3"),
        ("--steps", "ten", "'ten'"),
        ("--device", "abacus", "abacus"),
        ("--promts", "x", "did you mean --prompts"),
    ],
)
def test_bad_options_of_distill(option, value, words, onestep: Command, model, prompts, place):
    refused(onestep("distill", model, "--prompts", prompts, "--out", place / "run", option, value), place, words)


@pytest.mark.parametrize(
    "option, value, words",
    [
        ("--size", "30x30", "multiples of 8"),
        ("--size", "8x8,16x16", "one size"),
        ("--steps", "0", "--steps is 0"),
        ("--seed", "-1", "--seed is -1"),
        ("--seed", "one", "invalid int"),
        ("--guidance", "99", "--guidance is 99"),
        ("--recipe", "lcm-4", "--lora"),
        ("--out", "a.jpg", ".png"),
        ("--out", "nowhere/a.png", "no folder"),
    ],
)
def test_bad_options_of_generate(option, value, words, onestep: Command, model, place, monkeypatch):
    monkeypatch.chdir(place)
    refused(onestep("generate", model, "--prompt", "red", "--out", "b.png", option, value), place, words)


def test_a_recipe_that_is_not_known_or_not_of_this_family(onestep: Command, model, trained, place):
    draw = ["generate", model, "--lora", trained / "result.safetensors", "--prompt", "red", "--out", place / "a.png"]
    refused(onestep(*draw, "--recipe", "lcm4"), place, "did you mean 'lcm-4'")
    refused(onestep(*draw, "--recipe", "flux-schnell-4"), place, "'flux'")


def test_a_foreign_lora_that_does_not_say_how_it_is_sampled(onestep: Command, model, trained, place, tmp_path):
    file = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(trained / "result.safetensors"), file)
    draw = ["generate", model, "--lora", file, "--prompt", "red", "--out", place / "a.png"]
    refused(onestep(*draw), place, "--recipe")
    assert onestep(*draw, "--recipe", "lcm-4").code == 0


@pytest.mark.parametrize("words", [["distil"], ["dmd"], ["--version-of-everything"]])
def test_commands_that_are_none(words, onestep: Command, place):
    refused(onestep(*words), place, words[0])


def test_real_pictures_that_are_none(onestep: Command, model, prompts, place, tmp_path):
    file = tmp_path / "real.npz"
    ask = ["evaluate", model, "--prompts", prompts, "--reference", file, "--json", place / "a.json", "--samples", 4]
    refused(onestep(*ask), place, "real.npz")
    file.write_bytes(b"PK\x03\x04 no zip")
    refused(onestep(*ask), place, "real.npz")


def test_too_few_samples(onestep: Command, model, prompts, place):
    ask = ["evaluate", model, "--prompts", prompts, "--json", place / "a.json", "--samples", 1]
    refused(onestep(*ask), place, "--samples is 1")


# -- runs -------------------------------------------------------------------------------------------------------------


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("more, words", [([], "--resume"), (["--resume", "--set", "rank=3"], "rank (2 there, 3 now)")])
def test_a_run_that_is_another(more, words, onestep: Command, model, prompts, trained):
    before = listing(trained)
    said = onestep("distill", model, "--prompts", prompts, "--out", trained, *SHORT, *more)
    assert said.code == 2 and words in said.message and said.out == ""
    assert listing(trained) == before


def test_a_run_where_a_file_is(onestep: Command, model, prompts, tmp_path):
    file = tmp_path / "run"
    file.write_text("mine")
    said = onestep("distill", model, "--prompts", prompts, "--out", file, *SHORT)
    assert said.code == 2 and "cannot be made" in said.message
    assert file.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["run"]
