"""A pipeline on a card with little memory: its autoencoder in tiles or on the CPU, its texts in their own dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import sd
from torch import Tensor

from onestep.core.memory import OutOfMemory, noticed
from onestep.core.tensor_file import map_tensors, read_tensors, write_tensors
from onestep.pipelines import autoencoder as module
from onestep.pipelines.adapt import adapt
from onestep.pipelines.autoencoder import ON_CPU, TILED, Autoencoder
from onestep.pipelines.places import channels_last
from onestep.training.engine.prompts import embed
from onestep.training.methods import settings_for


@pytest.fixture
def vae() -> Any:
    return sd().vae


def cramped(vae: Any, most: int) -> list[tuple[int, ...]]:
    """The decoder holds no more than ``most`` latents. Shapes that it was asked for."""
    asked: list[tuple[int, ...]] = []

    def ask(layer: Any, args: tuple[Tensor, ...]) -> None:
        asked.append(tuple(args[0].shape))
        if args[0].numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    vae.decoder.register_forward_pre_hook(ask)
    return asked


def test_a_picture_that_does_not_fit_is_drawn_in_tiles(vae: Any) -> None:
    """As the pipeline's own tiles are, and the pipeline's own choice stays what it was."""
    torch.manual_seed(0)
    latents = torch.randn(2, vae.config.latent_channels, 24, 24)
    vae.tile_latent_min_size, vae.tile_sample_min_size = 8, 8 * 2 ** (len(vae.config.block_out_channels) - 1)
    vae.enable_tiling()
    wanted = Autoencoder(vae, torch.device("cpu")).decode(latents, [None] * 2)
    vae.disable_tiling()
    asked, notes = cramped(vae, latents[0].numel() // 2), []  # type: ignore[var-annotated]
    decoder = Autoencoder(vae, torch.device("cpu"))
    with noticed(notes):
        found = decoder.decode(latents, [None] * 2)
    assert torch.equal(found, wanted) and not vae.use_tiling and notes == [TILED]
    assert sum(shape[-1] == 24 for shape in asked) == 1, "what failed is not tried again"


def test_where_tiles_do_not_fit_either_the_cpu_draws(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that no tile fits on: the way through the CPU is the picture as it would be there."""
    latents, places = torch.randn(1, vae.config.latent_channels, 8, 8), []  # type: ignore[var-annotated]
    wanted = Autoencoder(vae, torch.device("cpu")).decode(latents, [None])
    decoder = Autoencoder(vae, torch.device("cpu"))
    decoder._ways = [
        ("", torch.device("cpu"), False),
        (TILED, torch.device("cpu"), True),
        (ON_CPU, torch.device("cpu"), False),
    ]
    real, calls = vae.decode, iter(range(9))

    def decode(*args: Any, **more: Any) -> Any:
        if next(calls) < 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return real(*args, **more)

    monkeypatch.setattr(vae, "decode", decode)
    notes: list[str] = []
    with noticed(notes):
        assert torch.equal(decoder.decode(latents, [None]), wanted)
    assert notes == [TILED, ON_CPU] and places == []


def test_where_nothing_fits_it_is_a_sentence(vae: Any) -> None:
    cramped(vae, 0)
    with pytest.raises(OutOfMemory, match="out of memory in the autoencoder"):
        Autoencoder(vae, torch.device("cpu")).decode(torch.randn(1, vae.config.latent_channels, 8, 8), [None])


def test_a_card_may_fall_back_to_the_cpu() -> None:
    assert [way[0] for way in Autoencoder(sd().vae, torch.device("cuda"))._ways] == ["", TILED, ON_CPU]
    assert module.ON_CPU not in [way[0] for way in Autoencoder(sd().vae, torch.device("cpu"))._ways]


# -- texts ------------------------------------------------------------------------------------------------------------


def test_texts_keep_their_dtype_and_a_batch_has_them_in_float32(tmp_path: Path) -> None:
    """One file for every size, of the encoders' own numbers; what a batch sees is what it saw."""
    pipe = sd()
    pipe.text_encoder.to(torch.bfloat16)
    host = adapt(pipe, device="cpu")
    settings = settings_for(sizes="64x64,64x32", seed=1)
    prompts = embed(host, ["a cat", "red dog"], settings, tmp_path)
    (path,) = tmp_path.iterdir()
    assert read_tensors(path)["text"].dtype is torch.bfloat16
    first, second = prompts.conds.values()
    assert first.text.data_ptr() == second.text.data_ptr(), "one copy for all sizes"
    wanted = host.encode(["a cat", "red dog"], (64, 64)).text
    batch = prompts.of((64, 64), torch.tensor([1, 0]), 0, range(2))
    assert batch.cond.text.dtype is torch.float32 and torch.equal(batch.cond.text, wanted[[1, 0]])


def test_a_mapped_file_is_the_file_and_stays_as_it_is(tmp_path: Path) -> None:
    """Of any dtype and at any place in the file; writing to a tensor writes to no file."""
    draw = torch.Generator().manual_seed(0)
    tensors = {"a": torch.rand(3, 5, generator=draw) > 0.5, "b": torch.randn(7, generator=draw).bfloat16()}
    tensors |= {"c": torch.randn(2, 3, generator=draw), "d": torch.zeros(0, 4), "e": torch.tensor(3)}
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors)
    before, mapped = path.read_bytes(), map_tensors(path)
    assert mapped.keys() == tensors.keys()
    for name, value in tensors.items():
        assert mapped[name].dtype == value.dtype and torch.equal(mapped[name], value)
        mapped[name].zero_()
    assert path.read_bytes() == before


def test_the_network_makes_room_for_the_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card, here the meta device: the network is off it within, and on it after."""
    pipe = sd()
    host = adapt(pipe, device="cpu")
    moved: list[tuple[str, str]] = []
    for name in ("unet", "text_encoder"):
        part = getattr(pipe, name)

        def to(place: Any, name: str = name, **more: Any) -> None:
            moved.append((name, str(place)))

        monkeypatch.setattr(part, "to", to)
    with host.encoding():
        assert moved == []
    host.device = torch.device("meta")
    with host.encoding():
        assert moved == [("text_encoder", "meta")]


def test_convolutions_lie_otherwise_within_a_run_and_answer_the_same() -> None:
    pipe = sd()
    host, unet = adapt(pipe, device="cpu"), pipe.unet
    x, cond = torch.randn(2, 4, 8, 8), host.encode(["a cat", "red"], (64, 64))
    sigma = torch.full((2,), 0.5, dtype=torch.float64)
    before = [(weight.data_ptr(), weight.stride()) for weight in unet.parameters()]
    with torch.no_grad():
        wanted = host.denoiser(x, sigma, cond)
        with channels_last(unet, True):
            last = [w for w in unet.parameters() if w.ndim == 4]
            assert last and all(w.is_contiguous(memory_format=torch.channels_last) for w in last)
            torch.testing.assert_close(host.denoiser(x, sigma, cond), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(host.denoiser(x, sigma, cond), wanted)
    assert [weight.stride() for weight in unet.parameters()] == [stride for _, stride in before]
    with channels_last(unet, False):
        assert [weight.stride() for weight in unet.parameters()] == [stride for _, stride in before]
