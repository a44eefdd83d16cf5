"""A LoRA on a stored base and on the whole one: how far they are from each other, against the same thing by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import make, randomise
from torch import Tensor, nn

from onestep.core.errors import OneStepError
from onestep.core.lora_file import save_lora
from onestep.core.randomness import normal
from onestep.core.stored import store
from onestep.pipelines.adapt import adapt
from onestep.pipelines.storage import TIMES, compare, stored_as


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
    told = compare(stored, lambda: whole, file, ["a cat"], (64, 64))
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
    same = compare(whole, lambda: whole, file, [], (64, 64))
    assert same.base == same.student == 0 and same.direction == pytest.approx(1)
    with pytest.raises(OneStepError, match="of another architecture"):
        compare(stored, lambda: pair("sd3")[1], file, [], (64, 64))


def test_what_is_stored_is_named() -> None:
    stored, whole = pair()
    assert stored_as(stored.network) == "float8_e4m3fn" and stored_as(whole.network) == ""
