"""Single files of SD1.5, SD2 and SDXL: offline, exact, and every other file refused with a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import narrowed
from safetensors.torch import save_file
from single_checkpoints import PARTS, changed, checkpoint
from single_files import LAYOUTS, single_file_state, write_sparse
from tiny_pipelines import make
from torch import nn

from onestep.core.errors import OneStepError
from onestep.pipelines import single_file
from onestep.pipelines.adapt import adapt
from onestep.pipelines.clip_tokenizer import clip_tokenizer
from onestep.pipelines.load import load
from onestep.pipelines.single_file import CONFIGS, load_single_file

KINDS = list(LAYOUTS)

# As published: parameters of SD1.5's, SD2's and SDXL's networks.
PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_becomes_the_pipeline_it_was_made_from(kind: str, tmp_path: Path) -> None:
    pipe, file, configs = checkpoint(kind, tmp_path)
    loaded = load_single_file(file, torch.float32, configs)
    assert type(loaded) is type(pipe)
    for name in PARTS:
        if hasattr(pipe, name):
            theirs = dict(getattr(pipe, name).named_parameters())
            ours = dict(getattr(loaded, name).named_parameters())
            assert ours.keys() == theirs.keys()
            for key in ours:
                torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    assert loaded.scheduler.config.prediction_type == "epsilon"
    assert adapt(loaded).family == "unet"


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_configurations_are_the_published_networks(kind: str) -> None:
    for name, module in empty_parts(kind).items():
        assert sum(weight.numel() for weight in module.parameters()) == PARAMETERS[kind][name]


def empty_parts(kind: str) -> dict[str, nn.Module]:
    """The networks of the shipped configurations, without memory."""
    import diffusers
    import transformers

    parts = {}
    with torch.device("meta"):
        for name in PARAMETERS[kind]:
            config = json.loads((CONFIGS / kind / name / "config.json").read_text(encoding="utf-8"))
            if "_class_name" in config:
                parts[name] = getattr(diffusers, config["_class_name"]).from_config(config)
            else:
                cls = getattr(transformers, config["architectures"][0])
                parts[name] = cls(cls.config_class(**config))
    return parts


@pytest.mark.broad
@pytest.mark.slow
@pytest.mark.parametrize("kind", narrowed(["sd15", "sd2"], "sd15"))
def test_a_file_of_full_size_loads_with_what_is_shipped(kind: str, tmp_path: Path) -> None:
    write_sparse(tmp_path / "full.safetensors", single_file_state(empty_parts(kind), kind))
    pipe = load(tmp_path / "full.safetensors", dtype=torch.float16)
    assert sum(weight.numel() for weight in pipe.unet.parameters()) == PARAMETERS[kind]["unet"]
    assert pipe.tokenizer("a photo").input_ids == [49406, 320, 1125, 49407]


# -- CLIP's tokenizer -------------------------------------------------------------------------------------------------


def test_clips_tokenizer() -> None:
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    # OpenAI's own example, https://github.com/openai/CLIP: clip.tokenize(["a diagram", "a dog", "a cat"])
    expected = [[49406, 320, 22697, 49407], [49406, 320, 1929, 49407], [49406, 320, 2368, 49407]]
    assert [tokenizer(text).input_ids for text in ("a diagram", "a dog", "a cat")] == expected
    padded = tokenizer("a dog", padding="max_length").input_ids
    assert len(padded) == 77 and set(padded[4:]) == {49407}
    assert set(clip_tokenizer("!")("a dog", padding="max_length").input_ids[4:]) == {0}


# -- what is refused --------------------------------------------------------------------------------------------------


def table(path: Path, keys: dict[str, tuple[int, ...]]) -> Path:
    save_file({key: torch.zeros(shape) for key, shape in keys.items()}, path)
    return path


FIRST = single_file.FIRST
CASES = {
    "a LoRA": ({"lora_unet_x.lora_down.weight": (1, 1)}, "is a LoRA"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": (1, 1)}, "SD3 or Flux.*diffusers folder"),
    "SD3": ({"model.diffusion_model.joint_blocks.0.x.weight": (1, 1)}, "SD3 or Flux.*diffusers folder"),
    "FLUX.2": (
        {"double_blocks.0.x.weight": (1, 1), "double_stream_modulation_img.lin.weight": (1, 1)},
        "a FLUX.2 checkpoint.*diffusers folder",
    ),
    "Krea 2": ({"txtfusion.projector.weight": (1, 12)}, "a Krea 2 checkpoint.*diffusers folder.*ComfyUI"),
    "Z-Image": ({"noise_refiner.0.x.weight": (1, 1), "x_pad_token": (1, 1)}, "a Z-Image checkpoint.*diffusers folder"),
    "Z-Image Omni": (
        {
            "model.diffusion_model.noise_refiner.0.x.weight": (1, 1),
            "model.diffusion_model.siglip_embedder.1.weight": (1, 1),
        },
        "a checkpoint of Z-Image Omni, which is not served: use .*, Z-Image",
    ),
    "Chroma": (
        {"double_blocks.0.x.weight": (1, 1), "distilled_guidance_layer.x.weight": (1, 1)},
        "a Chroma checkpoint.*diffusers folder",
    ),
    "Lumina 2": (
        {"noise_refiner.0.x.weight": (1, 1), "cap_embedder.1.weight": (1, 1)},
        "a Lumina 2 checkpoint.*diffusers folder.*ComfyUI",
    ),
    "PixArt": ({"t_block.1.weight": (1, 1), "y_embedder.y_embedding": (1, 1)}, "a PixArt-Sigma checkpoint.*ComfyUI"),
    "Qwen-Image": (
        {"transformer_blocks.0.x.weight": (1, 1), "txt_norm.weight": (1,)},
        "a Qwen-Image checkpoint.*diffusers folder.*ComfyUI",
    ),
    "a part": ({"down_blocks.0.resnets.0.conv1.weight": (1, 1)}, "one part of a pipeline"),
    "anything": ({"weight": (1,)}, "no checkpoint of SD1.5"),
    "nothing": ({}, "no checkpoint of SD1.5"),
    "inpainting": ({FIRST: (320, 9, 3, 3)}, "9 input channels"),
    "a U-Net alone": ({FIRST: (320, 4, 3, 3)}, "without its text encoder"),
    "Playground": ({FIRST: (320, 4, 3, 3), "edm_mean": (1,)}, "EDM"),
    "the refiner": ({FIRST: (384, 4, 3, 3), "conditioner.embedders.0.model.ln_final.bias": (1,)}, "refiner"),
}


@pytest.mark.parametrize("case", CASES)
def test_other_files_are_refused_with_what_they_are(case: str, tmp_path: Path) -> None:
    keys, why = CASES[case]
    with pytest.raises(OneStepError, match=why) as caught:
        load(table(tmp_path / "x.safetensors", keys))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["flux-2-klein-9b-kv", "FLUX.2_klein_KV_fp8"])
def test_a_klein_that_keeps_keys_and_values_is_known_by_its_name(name: str, tmp_path: Path) -> None:
    """Its weights have the shapes of klein 9B's."""
    path = table(tmp_path / f"{name}.safetensors", {"double_stream_modulation_img.lin.weight": (1, 1)})
    with pytest.raises(OneStepError, match=r"is FLUX.2 klein KV \(editing\), which is not served: use .*FLUX.2"):
        load(path)


@pytest.mark.parametrize("ending", ["ckpt", "pt", "bin", "pth"])
def test_pickles_are_refused(ending: str, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / f"x.{ending}")
    with pytest.raises(OneStepError, match="pickle"):
        load(tmp_path / f"x.{ending}")
    (tmp_path / f"x.{ending}").rename(tmp_path / "renamed.safetensors")
    with pytest.raises(OneStepError, match="pickle"):
        load(tmp_path / "renamed.safetensors")


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    _, file, configs = checkpoint("sd15", tmp_path)
    whole = file.read_bytes()
    for length in (4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(OneStepError, match="not a sound .safetensors"):
            load_single_file(file, torch.float32, configs)


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("model.diffusion_model.out.2.weight", "U-Net"),
        ("first_stage_model.decoder.conv_out.weight", "VAE"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "text encoder"),
    ],
)
def test_a_file_that_lacks_weights_is_refused(key: str, part: str, tmp_path: Path) -> None:
    _, file, configs = checkpoint("sd15", tmp_path)
    changed(file, lambda state: state.pop(key))
    with pytest.raises(OneStepError, match=f"{part}|cannot be loaded"):
        load_single_file(file, torch.float32, configs)


def test_another_width_is_refused(tmp_path: Path) -> None:
    _, file, _ = checkpoint("sd15", tmp_path)
    with pytest.raises(OneStepError, match="x.safetensors") as caught:
        load(file)
    assert len(str(caught.value)) < 400


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file, configs = checkpoint("sd15", tmp_path)
    changed(file, lambda state: state["model.diffusion_model.out.2.weight"].view(-1)[:1].fill_(float("nan")))
    monkeypatch.setattr(single_file.load_single_file, "__defaults__", (configs,))
    with pytest.raises(OneStepError, match="unet.conv_out.weight holds numbers that are not finite"):
        load(file)


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_a_folder_loads_offline(name: str, tmp_path: Path) -> None:
    pipe = make(name)
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is type(pipe)
    assert adapt(loaded).base_hash == adapt(pipe).base_hash


def test_a_folder_of_half_precision_variants_loads(tmp_path: Path) -> None:
    make("sd").save_pretrained(tmp_path, variant="fp16")
    assert type(load(tmp_path)).__name__ == "StableDiffusionPipeline"


def test_our_own_pipelines_folder_loads_as_the_familys(tmp_path: Path) -> None:
    from onestep.pipelines.one_step import OneStepPipeline

    OneStepPipeline.from_pipe(make("sd3")).save_pretrained(tmp_path)
    assert type(load(tmp_path)).__name__ == "StableDiffusion3Pipeline"


def break_nothing(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def break_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{", encoding="utf-8")


def break_class(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "WanVACEPipeline"}), encoding="utf-8")


def break_weights(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def break_pickle(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")


def break_numbers(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    changed(file, lambda state: state["decoder.conv_out.bias"].fill_(float("inf")), {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (break_nothing, "no diffusers folder"),
        (break_index, "no diffusers folder"),
        (break_class, "WanVACEPipeline, which cannot be distilled"),
        (break_weights, "it is cut off"),
        (break_pickle, "pickle"),
        (break_numbers, "vae.decoder.conv_out.bias holds numbers that are not finite"),
    ],
)
def test_a_broken_folder_is_refused(damage: Any, why: str, tmp_path: Path) -> None:
    make("sd").save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(OneStepError, match=why) as caught:
        load(tmp_path)
    assert len(str(caught.value)) < 400


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(OneStepError, match="no model 'absent/model'.*tiny"):
        load("absent/model")
