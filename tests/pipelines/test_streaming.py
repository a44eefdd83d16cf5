"""A pipeline whose network is streamed: each family's training, its saved file and its check, what it draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepened import deepened
from delayed_link import DelayedLink, only_of_the_ring
from narrowed import narrowed
from tiny_pipelines import MAKERS, make

import onestep
from onestep.core import stream_link, streaming
from onestep.core.tensor_file import read_tensors
from onestep.pipelines.adapt import adapt

FEW: dict[str, Any] = {"steps": 2, "batch": 2, "pairs": 2, "teacher_steps": 2, "rank": 2, "sizes": "16x16"}
FEW |= {"watch_every": 1, "watch_samples": 4, "preview_every": 1, "preview_samples": 1, "learning_rate": 1e-3}


def made(name: str) -> Any:
    pipe = make(name)
    deepened(getattr(pipe, "unet", None) or pipe.transformer)
    return pipe


def pictures(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "previews").iterdir())}


@pytest.mark.parametrize("method", narrowed(["regression", "dmd"], "regression"))
@pytest.mark.parametrize("name", narrowed(MAKERS, "sd3"))
def test_a_run_is_the_resident_one(name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a link that breaks what it copies until it is waited for."""
    links: list[DelayedLink] = []

    def delayed(device: torch.device) -> Any:
        links.append(DelayedLink(device))
        return links[-1]

    monkeypatch.setattr(streaming, "link_of", delayed)
    few = FEW | ({"warm_start": 1, "critic_warm_up": 1, "critic_updates": 1} if method == "dmd" else {})
    few |= {"matching_guidance": 1.0} if method == "dmd" and name == "flux" else {}
    found = {}
    for how in ("off", "on"):
        pipe = made(name)
        before = {key: value.clone() for key, value in adapt(pipe).network.state_dict().items()}
        found[how] = onestep.distill(pipe, ["a cat"], method, out=tmp_path / how, streaming=how, **few)
        after = adapt(pipe).network.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert "loads all" in found[how].check
    tensors = [read_tensors(found[how].path) for how in ("off", "on")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    assert pictures(tmp_path / "off") == pictures(tmp_path / "on")
    clocks = ("seconds",)
    lines = [[{k: v for k, v in line.items() if k not in clocks} for line in found[how].metrics] for how in found]
    assert lines[0] == lines[1]
    assert len(links) == 1 and links[0].closed and len(links[0].waited) > 20


@pytest.mark.parametrize("name", MAKERS)
def test_all_of_its_blocks_are_streamed(name: str) -> None:
    """What is left on the device is small beside them in every real network; here all their weights are in the ring."""
    host = adapt(made(name))
    host.streamed = True
    with host.training(), streaming.streamed(host.network, host.blocks, host.device, DelayedLink()) as stream:
        assert set(stream._packed) == set(host.blocks)
        with only_of_the_ring(stream), torch.no_grad():
            x = torch.randn(2, *host.latent_shape((16, 16)))
            sigma = host.denoiser.schedule.sigma_at(torch.tensor([0.4, 0.8]))
            host.denoiser(x, sigma, host.encode(["a cat", "red"], (16, 16)))
        assert stream.copies == len(host.blocks)


def test_a_run_that_fails_gives_the_pipeline_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the ring itself finds no memory."""
    pipe = make("sd")
    before = {name: (value, value.clone()) for name, value in pipe.unet.named_parameters()}

    def none_left(self: Any, size: int) -> Any:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(stream_link.PlainLink, "slot", none_left)
    with pytest.raises(torch.OutOfMemoryError):
        onestep.distill(pipe, ["a cat"], "regression", out=tmp_path / "run", streaming="on", **FEW)
    for name, value in pipe.unet.named_parameters():
        assert value is before[name][0] and torch.equal(value, before[name][1])
