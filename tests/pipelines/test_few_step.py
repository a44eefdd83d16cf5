"""A few-step checkpoint is read a tensor at a time, from a folder and from a single file, by the base's names."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from single_checkpoints import changed, checkpoint, tiny
from single_files import LAYOUTS, place_upsamplers, unet_keys
from torch import Tensor

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.pipelines import few_step, single_file
from onestep.pipelines.adapt import adapt
from onestep.pipelines.extract import extract_lora
from onestep.pipelines.few_step import FewStep

RECIPE, SIZE = Recipe((999.0, 499.0), renoise=True), (16, 16)
LAYER = "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_q"
NAME = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"


def made(kind: str, folder: Path, monkeypatch: Any, **more: Tensor) -> tuple[Any, Path]:
    """A tiny pipeline and its single file, which is read by the tiny configurations."""
    pipe, file, configs = checkpoint(kind, folder, **more)
    monkeypatch.setattr(single_file, "CONFIGS", configs)
    return pipe, file


def apart(pipe: Any) -> Any:
    """Every matrix and kernel moved by noise."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            if weight.ndim > 1:
                weight.add_(0.05 * torch.randn(weight.shape, generator=draw))
    return pipe


class Read:
    """What few-step checkpoints have been asked for. most: bytes of it that were in memory at once."""

    def __init__(self, monkeypatch: Any) -> None:
        self.there: list[tuple[weakref.ref[Tensor], int]] = []
        self.most, self.whole, self.read = 0, 0, few_step.read_tensor
        monkeypatch.setattr(few_step, "read_tensor", self)

    def __call__(self, path: Path, header: Any, name: str) -> Tensor:
        found = self.read(path, header, name)
        self.there = [(seen, size) for seen, size in self.there if seen() is not None]
        # the storage lives as long as any view of it
        self.there.append((weakref.ref(found.untyped_storage()), found.nbytes))  # type: ignore[arg-type]
        self.most = max(self.most, sum(size for _, size in self.there))
        self.whole += found.nbytes
        return found


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_single_file_is_read_by_the_bases_names(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    pipe, file = made(kind, tmp_path, monkeypatch)
    few, state = FewStep(file, pipe), pipe.unet.state_dict()
    assert few.names() == set(state) and few.prediction == "epsilon" and few.name == "x.safetensors"
    assert all(torch.equal(few.tensor(name), value) for name, value in state.items())
    with pytest.raises(OneStepError, match="has no made.up"):
        few.tensor("made.up")


@pytest.mark.parametrize("form", ["folder", "file"])
def test_no_more_is_in_memory_than_two_of_the_largest_layer(form: str, tmp_path: Path, monkeypatch: Any) -> None:
    """From opening it to the pictures of both; and the two forms give the same LoRA as the difference of modules."""
    base, (pipe, file) = tiny("sd15"), made("sd15", tmp_path, monkeypatch)
    apart(pipe).save_pretrained(tmp_path / "few")
    if form == "file":
        written = {key: value.contiguous() for key, value in unet_keys(pipe.unet).items()}
        changed(file, lambda state: state.update(place_upsamplers(written)))
    counted, host = Read(monkeypatch), adapt(base)
    before = {name: value.clone() for name, value in host.network.state_dict().items()}
    few = {"folder": tmp_path / "few", "file": file}[form]
    FewStep(few, base)
    assert counted.whole == 0
    found = extract_lora(host, few, tmp_path / "lora.safetensors", 4096, RECIPE, ["a cat"], SIZE)
    host.release()
    largest = max(value.nbytes for value in before.values())
    whole = sum(value.nbytes for value in before.values())
    assert counted.whole >= 2 * whole > 10 * largest and largest <= counted.most <= 2 * largest
    assert found.apart is not None and found.apart < 0.02 and found.beside == 0
    after = pipe.unet.state_dict()
    for name, (a, b) in found.state.items():
        wanted = after[f"{name}.weight"] - before[f"{name}.weight"]
        torch.testing.assert_close((b.flatten(1) @ a.flatten(1)).reshape(wanted.shape), wanted, rtol=0, atol=1e-5)


def test_scaled_fp8_is_read_as_the_numbers_that_it_stands_for(tmp_path: Path, monkeypatch: Any) -> None:
    pipe, file = made("sd15", tmp_path, monkeypatch)
    stored = {}

    def scaled(state: dict[str, Tensor]) -> None:
        scale = state[f"{LAYER}.weight"].abs().max() / 448
        stored["q"], stored["s"] = (state[f"{LAYER}.weight"] / scale).to(torch.float8_e4m3fn), scale
        mark = torch.zeros(2).to(torch.float8_e4m3fn)
        state |= {f"{LAYER}.weight": stored["q"], f"{LAYER}.scale_weight": scale}
        state["model.diffusion_model.scaled_fp8"] = mark

    few = FewStep(changed(file, scaled), pipe)
    assert few.names() == set(pipe.unet.state_dict())
    assert torch.equal(few.tensor(f"{NAME}.weight"), stored["q"].float() * stored["s"])


def test_what_it_answers_is_read_from_the_file(tmp_path: Path, monkeypatch: Any) -> None:
    pipe, file = made("sd15", tmp_path, monkeypatch, v_pred=torch.zeros(()))
    assert FewStep(file, pipe).prediction == "v_prediction"


def test_what_is_no_such_checkpoint_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    pipe, file = made("sd15", tmp_path, monkeypatch)
    (tmp_path / "flow" / "transformer").mkdir(parents=True)
    with pytest.raises(OneStepError, match="flow has no folder 'unet': give two checkpoints of one base"):
        FewStep(tmp_path / "flow", pipe)
    with pytest.raises(OneStepError, match="no model"):
        FewStep(tmp_path / "nowhere.safetensors", pipe)
    cut = changed(file, lambda state: state.pop(f"{LAYER}.weight"))
    with pytest.raises(OneStepError, match="incomplete, or of another architecture .*attn2.to_q.weight"):
        FewStep(cut, pipe)
    assert load_file(cut)
