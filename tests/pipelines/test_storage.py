"""A LoRA on a stored base and on the whole one: how far they are from each other, against the same thing by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import make, randomise
from torch import Tensor, nn

from onestep.core.errors import OneStepError
from onestep.core.lora_file import load_lora, save_lora
from onestep.core.memory import noticed
from onestep.core.randomness import normal
from onestep.core.recipe import Recipe, step_names
from onestep.core.stored import store, stored_as
from onestep.pipelines.adapt import adapt
from onestep.training.evaluation.storage import TIMES, Apart, apart, predictions, refuse_other, tried


def pair(name: str = "sd") -> tuple[Any, Any]:
    """A host in fp8 with a scale for each row, and its whole one."""
    hosts = []
    for stored in (True, False):
        torch.manual_seed(0)
        pipe = make(name)
        network = getattr(pipe, "unet", None) or pipe.transformer
        torch.manual_seed(1)
        randomise(network)
        for layer in network.modules() if stored else ():
            if type(layer) is nn.Linear and "time" not in str(layer):
                store(layer)
        hosts.append(adapt(pipe, device="cpu"))
    return hosts[0], hosts[1]


def lora(host: Any, folder: Path) -> Path:
    host.denoiser.roles.add("made", 2, 0)
    for number, (_, b) in enumerate(host.denoiser.roles.state("made").values()):
        b.copy_(0.1 * torch.randn(b.shape, generator=torch.Generator().manual_seed(number)))
    save_lora(folder / "x.safetensors", host.denoiser.roles.state("made"), host.family)
    return folder / "x.safetensors"


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_it_is_the_difference_of_predictions(name: str, tmp_path: Path) -> None:
    stored, whole = pair(name)
    file = lora(whole, tmp_path)
    told = compared(stored, whole, file, ["a cat"])
    found: dict[tuple[str, str], Tensor] = {}
    for kind, host in (("stored", stored), ("whole", whole)):
        host.denoiser.roles.load("made", whole.denoiser.roles.state("made"))
        for role in ("teacher", "made"):
            made = []
            for number, time in enumerate(TIMES):
                x = normal(host.latent_shape((64, 64)), 0, "storage", number, [0])
                sigma = host.denoiser.schedule.sigma_of_time(torch.tensor([time], dtype=torch.float64))
                with torch.no_grad(), host.denoiser.roles.use(role):
                    made.append(host.denoiser(x, sigma, host.encode(["a cat"], (64, 64))))
            found[kind, role] = torch.stack(made)
    base = found["stored", "teacher"] - found["whole", "teacher"]
    student = found["stored", "made"] - found["whole", "made"]
    change = found["whole", "made"] - found["whole", "teacher"]
    assert told.base == pytest.approx(float(base.norm() / found["whole", "teacher"].norm()), rel=1e-3)
    assert told.student == pytest.approx(float(student.norm() / found["whole", "made"].norm()), rel=1e-3)
    assert told.change == pytest.approx(float(change.norm() / found["whole", "teacher"].norm()), rel=1e-3)
    assert 0 < told.base < 0.2 < told.change or told.base < told.change
    assert 0.5 < told.direction < 1 and f"{told.student:.1%}" in told.told()
    assert set(stored.denoiser.roles.names()) == {"made"}


def test_a_base_is_no_distance_from_itself_and_none_from_another_family(tmp_path: Path) -> None:
    stored, whole = pair()
    file = lora(whole, tmp_path)
    same = compared(whole, whole, file, [])
    assert same.base == same.student == 0 and same.direction == pytest.approx(1)
    refuse_other(stored, whole)
    with pytest.raises(OneStepError, match="of another architecture .* give the same base, unquantised"):
        refuse_other(stored, pair("sd3")[1])


def test_a_base_of_other_widths_or_depth_is_another() -> None:
    stored, _ = pair()
    for change in ({"block_out_channels": (64, 64)}, {"layers_per_block": 2}):
        torch.manual_seed(0)
        pipe = make("sd")
        told = {**pipe.unet.config, **change}
        pipe.unet = type(pipe.unet).from_config(told)
        with pytest.raises(OneStepError, match="of another architecture"):
            refuse_other(stored, adapt(pipe, device="cpu"))


def test_each_level_is_asked_of_its_own_steps_file(tmp_path: Path) -> None:
    """Of two steps, from 999 and from 499: the first file answers at 980, 750 and 500, the second at 250."""
    _, whole = pair()
    recipe = replace(Recipe((999.0, 499.0)), files=step_names("steps.safetensors", 2))
    (first, second), expected = [tmp_path / name for name in recipe.files], []
    for size, path in ((1.0, first), (-2.0, second)):
        loaded = load_lora(lora(whole, tmp_path))
        state = {name: (a, size * b) for name, (a, b) in loaded.state.items()}
        save_lora(path, state, loaded.family)
        expected.append(predictions(whole, path, ["a cat"], (64, 64)).student)
        save_lora(path, state, loaded.family, recipe.to_json())
    found = predictions(whole, first, ["a cat"], (64, 64)).student
    torch.testing.assert_close(found, torch.cat([expected[0][:3], expected[1][3:]]))
    assert float((expected[0] - expected[1])[3:].norm()) > 0.01
    assert set(whole.denoiser.roles.names()) == {"made"}


def test_where_memory_runs_out_fewer_prompts_are_asked_at_a_time(tmp_path: Path) -> None:
    _, whole = pair()
    file, calls = lora(whole, tmp_path), []

    def full(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(len(args[0]))
        if len(args[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    wanted = predictions(whole, file, ["a cat", "a dog", "a wall"], (64, 64))
    handle = whole.network.register_forward_pre_hook(full, with_kwargs=True)
    notes: list[str] = []
    with noticed(notes):
        found = predictions(whole, file, ["a cat", "a dog", "a wall"], (64, 64))
    handle.remove()
    assert calls[:2] == [3, 2] and set(calls[2:]) == {1} and "in slices of 1" in notes[-1]
    torch.testing.assert_close(found.student, wanted.student, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.base, wanted.base, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_checked_is_said_and_nothing_more() -> None:
    def failed(error: Exception) -> str:
        def work() -> str:
            raise error

        found, why = tried(work)
        assert found is None
        return why

    assert tried(lambda: "told") == ("told", "")
    assert failed(OneStepError("no model")) == "the LoRA could not be checked on the unquantised base: no model"
    assert "CUDA out of memory" in failed(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(KeyboardInterrupt):
        tried(cancelled)


def cancelled() -> None:
    raise KeyboardInterrupt


def compared(stored: Any, whole: Any, file: Path, prompts: list[str]) -> Apart:
    return apart(*(predictions(host, file, prompts, (64, 64)) for host in (stored, whole)))


def test_what_is_stored_is_named() -> None:
    stored, whole = pair()
    assert stored_as(stored.network) == "float8_e4m3fn" and stored_as(whole.network) == ""
