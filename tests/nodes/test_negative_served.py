"""Apply Negative Adapter in a running server: trained by the node, drawn with, refused with a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_graphs import (
    ADAPTER,
    LORA,
    NEGATIVE,
    PROMPT,
    SEED,
    apart,
    distil,
    few_step,
    graph,
    ksampler,
    latents,
    loader,
    saved,
    text,
)
from diffusers import DiffusionPipeline
from narrowed import narrowed
from PIL import Image

from onestep.core.adapter_file import read_told
from onestep.pipelines.negative_adapter import load_negative_adapter

NEGATIVES = {"negatives": "wall, blue"}
pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]
TOLERANCE = 1e-5


def apply_negative(adapter: Any, scale: float = 1.0, **plugs: Any) -> dict[str, Any]:
    told = {"model": ["model", 0], "negative": ["negative", 0], "adapter": adapter, "scale": scale, **plugs}
    return {"class_type": "OneStepApplyNegativeAdapter", "inputs": told}


def away(adapter: Any, model: str = "model") -> dict[str, Any]:
    """Nodes that draw without the adapter, with it at scales 0, 1 and 2, and away from another word."""
    nodes: dict[str, Any] = {"blue": text("blue", "texts"), "plain": ksampler(model, 2)}
    for name, told in (("at 0", {"scale": 0.0}), ("at 1", {}), ("at 2", {"scale": 2.0}), ("other", {})):
        told = {"model": [model, 0], **told} | ({"negative": ["blue", 0]} if name == "other" else {})
        nodes |= {f"away {name}": apply_negative(adapter, **told), name: ksampler(f"away {name}", 2)}
    return nodes


def check_drawn(drawn: dict[str, torch.Tensor]) -> None:
    """Scale 0 is no adapter, to the bit; each other scale and each other word draws something else."""
    assert torch.equal(drawn["at 0"], drawn["plain"])
    others = ["plain", "at 1", "at 2", "other"]
    assert all(bool(drawn[name].isfinite().all()) for name in others)
    seen = {(a, b): apart(drawn[a], drawn[b]) for a in others for b in others if a < b}
    assert min(seen.values()) > 0.003, seen


# -- trained by the node ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(comfy_server: Any) -> tuple[dict[str, torch.Tensor], Path]:
    """What one graph draws that trains one step, a negative adapter beside it, and draws with both; the file."""
    nodes = {
        "first": distil("before-away", "regression"),
        "distil": distil("away", "sun", NEGATIVES, initial_lora=["first", LORA]),
        "lora": few_step("model", "first"),
        **away(["distil", ADAPTER], "lora"),
    }
    drawn = latents(comfy_server, graph("tiny", 32, **nodes))
    return drawn, comfy_server.base / "models" / "onestep" / "away.safetensors"


@pytest.mark.broad
def test_an_adapter_is_trained_and_used_in_one_graph(trained: Any) -> None:
    drawn, file = trained
    check_drawn(drawn)
    told = read_told(file)
    assert told is not None and told["kind"] == "negative-attention"


def test_its_run_shows_without_as_asked_and_with(trained: Any, comfy_server: Any) -> None:
    first, *_, last = sorted((comfy_server.base / "output" / "onestep" / "away" / "previews").iterdir())
    begun, ended = (np.split(np.array(Image.open(path)), 3) for path in (first, last))
    assert (begun[0] == begun[2]).all() and (begun[0] != begun[1]).any(), "a new adapter changes nothing"
    assert (ended[0] == begun[0]).all() and (ended[1] == begun[1]).all() and (ended[2] != begun[2]).any()


@torch.no_grad()
def test_both_hosts_draw_the_same(trained: Any, comfy_server: Any, bundled: dict[str, Path]) -> None:
    nodes = {"away": apply_negative("away.safetensors", 1.5), "drawn": ksampler("away")}
    ours = latents(comfy_server, graph("tiny", 32, **nodes))["drawn"]
    pipe = DiffusionPipeline.from_pretrained(bundled["tiny"])
    pipe.set_progress_bar_config(disable=True)
    told = {"num_inference_steps": 1, "guidance_scale": 1.0, "width": 32, "height": 32, "output_type": "latent"}
    noise = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(SEED))
    negative = pipe.encode_prompt(NEGATIVE, "cpu", 1, False)[0]
    with load_negative_adapter(pipe, trained[1], negative, scale=1.5):
        theirs = pipe([PROMPT] * 2, latents=noise, **told).images / pipe.vae.config.scaling_factor
    assert float((ours - theirs).abs().max()) < TOLERANCE * float(theirs.abs().max())


@pytest.mark.broad
def test_the_run_says_which_node_loads_it(trained: Any, comfy_server: Any) -> None:
    nodes = {
        "distil": distil("away-alone", "sun", NEGATIVES),
    }
    told = comfy_server.run(graph("tiny", 32, **nodes)).outputs["distil"]["text"][0]
    assert told.startswith("away-alone.safetensors") and "load it with Apply Negative Adapter" in told


@pytest.mark.parametrize("name", narrowed(["sd3", "flux", "tiny-flow"], "sd3"))
def test_a_base_without_cross_attention_is_refused_before_it_is_trained(
    server_with_checkpoints: Any, name: str
) -> None:
    """Flux, not guided by CFG, is refused for that; both say what to choose."""
    run = f"away-{name}"
    nodes = {"distil": distil(run, "sun")}
    nodes["distil"]["inputs"] |= {"clip": ["texts", 1], "vae": ["texts", 2], "sizes": "64x64"}
    refused = server_with_checkpoints.run(graph(name, 64, **nodes))
    assert ("no trained null" if name == "flux" else "U-Net's cross-attentions") in refused.error, refused.error
    assert len(refused.error) < 400
    assert not (server_with_checkpoints.base / "models" / "onestep" / f"{run}.safetensors").exists()


# -- on a checkpoint's layout -----------------------------------------------------------------------------------------


@pytest.mark.broad
def test_it_acts_on_a_checkpoint_of_sd15(stirred: Any) -> None:
    check_drawn(latents(stirred, graph("sd15", 64, **away("negative-sd15.safetensors"))))


def test_with_cfg_it_acts_on_the_prompt_alone(stirred: Any) -> None:
    """d = n + cfg (c - n): of one step at cfg 3 it changes three times what it changes of the prompt at cfg 1."""
    nodes = {"away": apply_negative("negative-sd15.safetensors")}
    for cfg in (1.0, 3.0):
        nodes |= {f"plain {cfg}": ksampler("model", 1, cfg), f"away {cfg}": ksampler("away", 1, cfg)}
    drawn = latents(stirred, graph("sd15", 64, **nodes))
    by_one, by_three = (drawn[f"away {cfg}"] - drawn[f"plain {cfg}"] for cfg in (1.0, 3.0))
    assert float((by_three - 3 * by_one).abs().max()) < 1e-3 * float(by_three.abs().max())


REFUSED = {
    # of the model, its adapter, what else is plugged in, and what is said
    "sd3": ("sd3", "negative-sd15", {}, ("which this 'sd3' model has not", "use Negative Steering")),
    "flux": ("flux", "negative-sd15", {}, ("which this 'flux' model has not", "use Negative Steering")),
    "of another base": ("tiny", "negative-sd15", {}, ("for another base", "768", "128", "Choose its base")),
    "of tiny": ("sd15", "away", {}, ("for another base", "128", "768", "Choose its base")),
    "a guidance adapter": ("sd15", "guidance-sd15", {}, ("kind 'guidance-cross-attention'", "choose another")),
    "of another encoder": ("tiny", "away", {"negative": ["foreign", 0]}, ("4096 wide", "reads 128", "CLIP")),
    "twice": ("tiny", "away", {"model": ["first", 0]}, ("has a negative adapter already",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_told_to_the_person(stirred: Any, trained: Any, case: str) -> None:
    name, adapter, plugs, words = REFUSED[case]
    nodes = {
        **{"other": loader("sd3"), "foreign": text("red", "other")},
        "first": apply_negative("away.safetensors"),
        "away": apply_negative(f"{adapter}.safetensors", **plugs),
        "drawn": ksampler("away"),
    }
    refused = stirred.run(graph(name, 64, **nodes, save=saved("drawn")))
    assert refused.status == "error" and len(refused.error) < 400, refused.error
    assert all(word in refused.error for word in words), refused.error
