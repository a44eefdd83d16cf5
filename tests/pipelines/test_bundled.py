"""The bundled teachers and the judge: unchanged, small, and loadable offline by the libraries' own loaders."""

from __future__ import annotations

import hashlib
import json
import socket

import pytest
import torch

from onestep.pipelines.bundled import MODELS, path_of
from onestep.training.evaluation.judge import Judge

LIMIT_BYTES = 16 * 2**20
SIZE = {"width": 32, "height": 32}
TOKENIZERS = [("tiny", "tokenizer"), ("tiny-flow", "tokenizer"), ("tiny-flow", "tokenizer_2")]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("this test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def pipeline(name: str):
    diffusers = pytest.importorskip("diffusers")
    kind, absent = {
        "tiny": (diffusers.StableDiffusionPipeline, ("safety_checker", "feature_extractor")),
        "tiny-flow": (diffusers.StableDiffusion3Pipeline, ("text_encoder_3", "tokenizer_3")),
        "tiny-dit": (diffusers.ZImagePipeline, ()),
    }[name]
    pipe = kind.from_pretrained(path_of(name), **dict.fromkeys(absent))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_weights_are_the_frozen_ones() -> None:
    root = path_of("tiny").parent
    written = json.loads((root / "HASHES.json").read_text(encoding="utf-8"))
    found = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*.safetensors")
    }
    assert found == written


@pytest.mark.parametrize("name", ["tiny", "tiny-flow", "tiny-dit", "judge"])
def test_a_folder_is_at_most_16_mib(name: str) -> None:
    assert sum(path.stat().st_size for path in path_of(name).rglob("*") if path.is_file()) <= LIMIT_BYTES


@pytest.mark.parametrize("name", ["tiny", "tiny-flow", "tiny-dit"])
def test_diffusers_draws_with_it_offline_in_float32(name: str, offline: None) -> None:
    pipe = pipeline(name)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.float32}
    seeded = torch.Generator().manual_seed(0)
    image = pipe("potion: blue", num_inference_steps=2, generator=seeded, output_type="np", **SIZE).images
    assert image.shape == (1, 32, 32, 3)
    assert 0.02 < image.std() < 0.5


@pytest.mark.parametrize("name", ["tiny", "tiny-flow", "tiny-dit"])
def test_latents_have_unit_deviation(name: str) -> None:
    """The tiles are not here, so pictures of the model stand for them."""
    pipe = pipeline(name)
    prompts = ["floor: grey stone", "weapon: giant club", "potion: sky blue", "wall: brick brown"] * 4
    seeded = torch.Generator().manual_seed(0)
    unguided = 0.0 if name == "tiny-dit" else 1.0  # diffusers' Z-Image counts from 0
    latents = pipe(
        prompts, num_inference_steps=8, guidance_scale=unguided, generator=seeded, output_type="latent", **SIZE
    ).images
    assert 0.6 < float(latents.std()) < 1.5


@pytest.mark.parametrize(("name", "part"), TOKENIZERS)
def test_tokenizer(name: str, part: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(path_of(name) / part)
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert tokenizer.model_max_length == 24
    ids = tokenizer("Potion: Zyx☃é").input_ids[1:-1]
    assert tokenizer.unk_token_id not in ids and len(ids) > 4
    assert tokenizer("weapon  Axe").input_ids == tokenizer("weapon axe").input_ids


@pytest.mark.parametrize(("name", "part"), TOKENIZERS)
def test_both_forms_of_the_tokenizer_agree(name: str, part: str) -> None:
    folder = path_of(name) / part
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert json.loads((folder / "vocab.json").read_text(encoding="utf-8")) == model["vocab"]
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert [tuple(line.split(" ")) for line in merges] == [tuple(pair) for pair in model["merges"]]
    letters = [piece for piece in model["vocab"] if len(piece) == 1]
    assert len(letters) == 256 and all(letter + "</w>" in model["vocab"] for letter in letters)


def test_sizes_fit_what_comfyui_can_build() -> None:
    """GroupNorm of 32, widths that are multiples of 32 and of the first; heads of 64 channels and patches of 2."""
    unet = json.loads((path_of("tiny") / "unet" / "config.json").read_text(encoding="utf-8"))
    widths = unet["block_out_channels"]
    assert unet["norm_num_groups"] == 32 and all(width % 32 == 0 and width % widths[0] == 0 for width in widths)
    mmdit = json.loads((path_of("tiny-flow") / "transformer" / "config.json").read_text(encoding="utf-8"))
    assert mmdit["attention_head_dim"] == 64 and mmdit["patch_size"] == 2
    assert mmdit["caption_projection_dim"] == 64 * mmdit["num_attention_heads"]
    stream = json.loads((path_of("tiny-dit") / "transformer" / "config.json").read_text(encoding="utf-8"))
    assert stream["dim"] % 96 == 0 and stream["n_heads"] == stream["n_kv_heads"] and stream["all_patch_size"] == [2]


def test_judge_knows_its_accuracy_and_the_words() -> None:
    from onestep.pipelines.tiny_words import BRIGHTNESS, COLOURS

    judge = Judge.load(path_of("judge"))
    assert judge.config["heads"]["colour"] == list(COLOURS)
    assert judge.config["heads"]["brightness"] == list(BRIGHTNESS)
    assert set(judge.config["held_out"]) == {"group", "colour", "brightness"}
    assert all(0.5 < accuracy < 1 for accuracy in judge.config["held_out"].values())


def test_judge_tells_the_words_of_plain_colours() -> None:
    judge = Judge.load(path_of("judge"))
    plain = torch.full((2, 3, 32, 32), 127 / 255)
    plain[0, :, 6:26, 6:26] = torch.tensor([0.75, 0.05, 0.05])[:, None, None]
    plain[1, :, 6:26, 6:26] = torch.tensor([0.05, 0.1, 0.8])[:, None, None]
    colours = judge.config["heads"]["colour"]
    assert [colours[at] for at in judge.predict(plain)["colour"].argmax(dim=1)] == ["red", "blue"]


def test_the_teachers_share_one_autoencoder() -> None:
    files = [path_of(name) / "vae" / "diffusion_pytorch_model.safetensors" for name in MODELS]
    assert len({file.read_bytes() for file in files}) == 1 and len(files) == 3
