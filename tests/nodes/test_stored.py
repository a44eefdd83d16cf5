"""Bases whose weights ComfyUI stores otherwise: trained as they are stored, with the numbers that they stand for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from narrowed import narrowed
from small_runs import small

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore::FutureWarning")]
SUPPORT = Path(__file__).resolve().parents[1] / "support"
EVERY = ["scaled", "scaled-input", "kitchen-fp8", "kitchen-e5m2", "int8", "int8-rows", "int8-rotated", "nvfp4"]
EVERY += ["mxfp8", "w4a4", "w4a8"]
KINDS = {
    "flux": ["scaled-input", "kitchen-fp8", "int8-rotated", "nvfp4", "w4a8"],
    "flux, all": EVERY,
    "sd15": ["scaled", "int8-rows"],
    "sd3": ["kitchen-fp8"],
    "z_image": ["scaled", "scaled-input", "kitchen-fp8", "nvfp4"],
    "flux2": ["scaled", "scaled-input", "kitchen-fp8", "int8-rotated", "nvfp4", "w4a8"],
    "krea2": ["scaled", "scaled-input", "kitchen-fp8", "nvfp4"],
    **dict.fromkeys(("anima", "chroma", "pixart"), ["scaled", "kitchen-fp8"]),
    **dict.fromkeys(("lumina2", "qwen_image"), ["scaled", "scaled-input", "nvfp4"]),
    "wan": ["scaled", "kitchen-fp8", "int8", "int8-rows", "int8-rotated"],
}
SMALL = {"z_image": "small_z_image.py", "flux2": "small_flux2.py", "krea2": "small_krea2.py"}
MODERN = ("anima", "chroma", "lumina2", "pixart", "qwen_image", "wan")
"""What makes those that are not among the tiny checkpoints."""
STORED = {"int8": "int8", "w4a4": "int8", "w4a8": "int8", "nvfp4": "uint8", "kitchen-e5m2": "float8_e5m2"}
ROUNDING = {"int8": 0.01, "w4a8": 0.01, "w4a4": 0.1}
"""By how much ComfyUI's own products of a kind differ on a CPU, which round their input; others do not there."""


@pytest.fixture(scope="module")
def layers(run_inside: Callable[..., str]) -> dict[str, Any]:
    return dict(json.loads(run_inside("stored_layers").strip().splitlines()[-1]))


def test_a_layer_is_that_of_the_numbers_that_its_weight_stands_for(layers: dict[str, Any]) -> None:
    """Forward, gradient, directional derivative; with a graph and without; nothing is kept, the input is left alone."""
    assert len(layers) == 28, sorted(layers)
    for name, told in layers.items():
        if name == "settled":
            continue
        assert told["forward"] < 1e-6 and told["gradient"] < 1e-6 and told["tangent"] < 1e-3, (name, told)
        assert told["same"] and told["untouched"] and told["kept"] == 0 and told["weight"] < 1e-6, (name, told)


def test_it_is_comfyuis_own_layer_but_for_the_rounding_of_inputs(layers: dict[str, Any]) -> None:
    for name, told in layers.items():
        rounds = "native" in name or "fast" in name or name.startswith(("int8", "w4"))
        assert name == "settled" or (1e-4 < told["own"] < 0.2 if rounds else told["own"] < 1e-6), (name, told)


def test_a_weight_that_is_cast_to_its_own_size_is_stored_so_once(layers: dict[str, Any]) -> None:
    assert layers["settled"] == {"same": True, "dtype": "torch.bfloat16", "bias": "torch.bfloat16"}


@pytest.fixture(scope="module")
def sources(comfy: Any, checkpoints: Path, tmp_path_factory: Any) -> Callable[[str], Path]:
    """The checkpoint of a name, before it is stored otherwise."""
    folder = tmp_path_factory.mktemp("small")

    def source(name: str) -> Path:
        file = f"tiny_{name.split(',')[0]}.safetensors"
        if name not in (*SMALL, *MODERN):
            return checkpoints / file
        if not (folder / file).exists():
            words = [name] if name in MODERN else []
            comfy.run_script(SUPPORT / SMALL.get(name, "small_modern.py"), *words, folder / file)
        return folder / file

    return source


@pytest.fixture(scope="module", params=narrowed(KINDS, "flux"))
def hosts(
    request: Any, comfy: Any, sources: Any, run_inside: Callable[..., str], tmp_path_factory: Any
) -> tuple[str, dict[str, Any]]:
    """What was found of each kind of a model's files."""
    name, folder = request.param, tmp_path_factory.mktemp("stored")
    source = sources(name)
    comfy.run_script(SUPPORT / "quantised_files.py", source, folder, *KINDS[name])
    files = [folder / f"{source.stem}_{kind}.safetensors" for kind in KINDS[name]]
    said = run_inside("stored_hosts", *files)
    found: dict[str, Any] = {}
    for line in said.strip().splitlines():
        found |= json.loads(line)
    return name, {kind: found[file.name] for kind, file in zip(KINDS[name], files, strict=True)}


def test_the_student_and_all_gradients_are_those_of_the_dequantised_twin(hosts: Any) -> None:
    for kind, told in hosts[1].items():
        assert max(told[name] for name in ("teacher", "student", "x", "factors")) < 1e-5, (kind, told)


def test_the_base_stays_as_it_is_stored_and_is_known_again(hosts: Any) -> None:
    for kind, told in hosts[1].items():
        wanted = STORED.get(kind.split("-")[0], STORED.get(kind, "float8_e4m3fn"))
        assert told["stored"] == ["torch.float32", f"torch.{wanted}"] and told["hash"], (kind, told)


def test_the_teacher_is_what_comfyui_draws(hosts: Any) -> None:
    for kind, told in hosts[1].items():
        least = ROUNDING.get(kind.split("-")[0], 0.0)
        assert told["drawn"] <= least, (kind, told)


STACKS: dict[str, list[str]] = {
    "flux": ["scaled"],
    "sd15": KINDS["sd15"],
    "sd3": KINDS["sd3"],
    "flux, all": EVERY,
    "z_image": ["scaled", "int8-rotated"],
    "flux2": ["scaled", "int8-rotated"],
    "krea2": ["scaled"],
    "wan": ["int8-rows"],
}


@pytest.mark.parametrize("name", narrowed(STACKS, "flux"))
def test_loras_on_a_quantised_base_are_part_of_the_teacher_as_they_are_drawn(
    name: str, comfy: Any, sources: Any, run_inside: Callable[..., str], tmp_path: Path
) -> None:
    """Two of core's loaders, one after the other; the plain MODEL is drawn as before."""
    source = sources(name)
    comfy.run_script(SUPPORT / "quantised_files.py", source, tmp_path, *STACKS[name])
    files = [tmp_path / f"{source.stem}_{kind}.safetensors" for kind in STACKS[name]]
    for line in run_inside("stored_hosts", "--loras", *files).strip().splitlines():
        ((file, told),) = json.loads(line).items()
        kind = file.removeprefix(f"{source.stem}_").removesuffix(".safetensors")
        rounding = ROUNDING.get(kind.split("-")[0], 0.0)
        assert told["effect"] > 0.05 and told["apart"] * told["effect"] <= rounding, (file, told)
        wanted = STORED.get(kind.split("-")[0], STORED.get(kind, "float8_e4m3fn"))
        assert f"torch.{wanted}" in told["stored"] and all(told["known"]) and told["again"] == 0, (file, told)


LEARNT = {
    **dict.fromkeys(("anima", "chroma", "lumina2", "pixart", "qwen_image"), ["scaled"]),
    "wan": ["scaled", "int8-rows"],
}


@pytest.mark.broad
@pytest.mark.parametrize("name", LEARNT)
def test_an_update_moves_the_adapter_alone_and_its_lora_draws_as_on_the_dequantised_base(
    name: str, comfy: Any, sources: Any, run_inside: Callable[..., str], tmp_path: Path
) -> None:
    """As hooks beside the weights, each layer called; by core's loader, which rounds the sum to how the base is
    stored."""
    source = sources(name)
    comfy.run_script(SUPPORT / "quantised_files.py", source, tmp_path, *LEARNT[name])
    files = [tmp_path / f"{source.stem}_{kind}.safetensors" for kind in LEARNT[name]]
    for line, kind in zip(run_inside("stored_learnt", tmp_path, *files).splitlines(), LEARNT[name], strict=True):
        told, rounds = next(iter(json.loads(line).values())), kind.startswith("int8")
        # the text goes nowhere in Qwen-Image's last block
        assert told["kept"] and (told["moved"] == 1 or (name == "qwen_image" and told["moved"] > 0.8)), (kind, told)
        assert told["effect"] > 0.2 and told["base"] <= 0.01 * rounds and not told["uncalled"], (kind, told)
        assert told["hooked"] <= 0.05 * rounds and told["loaded"] < 0.2 and told["loader"] < 1e-5, (kind, told)


@pytest.mark.broad
def test_plain_float8_is_trained_as_it_is_stored(
    comfy: Any, checkpoints: Path, run_inside: Callable[..., str], tmp_path: Path
) -> None:
    """As a loader's weight_dtype fp8_e4m3fn leaves it: every weight in fp8, convolutions too."""
    comfy.run_script(SUPPORT / "quantised_files.py", checkpoints / "tiny_sd15.safetensors", tmp_path, "fp8")
    said = run_inside("stored_hosts", "--fp8", tmp_path / "tiny_sd15_fp8.safetensors")
    told = next(iter(json.loads(said.strip().splitlines()[-1]).values()))
    assert max(told[name] for name in ("teacher", "student", "x", "factors")) < 1e-5, told
    assert told["stored"] == ["torch.float8_e4m3fn"] and told["drawn"] == 0 and told["hash"]


def test_other_packs_forms_and_broken_files_are_refused_with_what_to_load(
    comfy: Any, checkpoints: Path, run_inside: Callable[..., str], tmp_path: Path
) -> None:
    source = checkpoints / "tiny_flux.safetensors"
    comfy.run_script(SUPPORT / "quantised_files.py", source, tmp_path, "kitchen-fp8")
    said = run_inside("stored_refused", source, tmp_path / "tiny_flux_kitchen-fp8.safetensors")
    told = json.loads(said.strip().splitlines()[-1])
    assert told.pop("whole") == ""
    for kind, word in {
        "gguf": "a GGUF file's own form",
        "nf4": "Parameter torch.uint8",
        "svdquant": "no weight",
    }.items():
        text = told.pop(kind)
        assert word in text and "ComfyUI's own loaders" in text and "img_attn.qkv" in text, (kind, text)
    assert "scale is not a finite number" in told["nan"] and "download or quantise the file again" in told["nan"]


APART = re.compile(r"predictions differ by ([\d.]+)%, the base's own by ([\d.]+)%")


def assert_checked_against(server: Any, base: dict[str, Any], told: dict[str, Any], twin: Path) -> None:
    """The finished run's LoRA on the base before it was quantised, on the numbers that are stored, on another model."""
    shutil.copyfile(twin, server.base / "models" / "checkpoints" / twin.name)
    said = {}
    for name in ("tiny_flux.safetensors", twin.name, "tiny_sd3.safetensors"):
        whole = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": name}}
        plugs = {**told, "existing": "continue", "unquantized_model": ["whole", 0]}
        said[name] = server.run(base | {"whole": whole, "distil": {"class_type": "OneStepDistil", "inputs": plugs}})
    other = said.pop("tiny_sd3.safetensors")
    assert "tiny_sd3 is of another architecture than tiny_flux_scaled: give the same base" in other.error
    found = [APART.search(run.outputs["distil"]["text"][0]) for run in said.values()]
    before, numbers = ([float(number) for number in match.groups()] if match else [] for match in found)
    assert numbers == [0, 0] and all(0.1 < number < 20 for number in before) and before, (before, numbers)


@pytest.mark.broad
def test_a_server_trains_on_a_scaled_fp8_checkpoint_and_draws_with_the_lora(
    comfy: Any, server_with_checkpoints: Any, checkpoints: Path, tmp_path: Path
) -> None:
    """Loaded, distilled, and drawn with ComfyUI's own nodes."""
    server, name = server_with_checkpoints, "tiny_flux_scaled.safetensors"
    comfy.run_script(SUPPORT / "quantised_files.py", checkpoints / "tiny_flux.safetensors", tmp_path, "scaled")
    shutil.copyfile(tmp_path / name, server.base / "models" / "checkpoints" / name)
    few = {"preset": "Fast", "steps": 2, "student_steps": "1", "rank": 2, "sizes": "64x64", "teacher_steps": 2}
    plugs = {"model": ["base", 0], "clip": ["texts", 1], "vae": ["base", 2], "prompts": "a red dragon\na wall"}
    told = {**small("regression"), **plugs, **few, "name": "scaled", "existing": "restart"}
    lora = {"model": ["base", 0], "lora_name": "onestep/scaled.safetensors", "strength_model": 1.0}
    drawn = {"model": ["lora", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    drawn |= {"seed": 1, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    base: dict[str, Any] = {
        "base": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": name}},
        "texts": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "tiny_sd3.safetensors"}},
    }
    trained = server.run(base | {"distil": {"class_type": "OneStepDistil", "inputs": told}})
    assert trained.status == "success", trained.error
    assert "the base is stored in fp8e4m3: how far it is" in trained.outputs["distil"]["text"][0]
    assert_checked_against(
        server, base, {**told, "existing": "continue"}, tmp_path / "tiny_flux_scaled_twin.safetensors"
    )
    graph = base | {
        "lora": {"class_type": "LoraLoaderModelOnly", "inputs": lora},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["texts", 1], "text": "a red dragon"}},
        "empty": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "draw": {"class_type": "KSampler", "inputs": drawn},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["draw", 0], "vae": ["base", 2]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "scaled"}},
    }
    finished = server.run(graph)
    assert finished.status == "success", finished.error
    assert finished.outputs["save"]["images"]
