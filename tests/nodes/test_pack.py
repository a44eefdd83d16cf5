"""The pack in a running server: every node is there, and the tiny models draw what diffusers draws."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import DiffusionPipeline

from onestep.training.methods import METHODS
from onestep.training.settings import described

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore::FutureWarning")]

# Node ids are for ever: shared workflows name them.
IDS = {
    "OneStepLoadTinyModel",
    "OneStepPromptList",
    "OneStepDistil",
    "OneStepTrainAdapter",
    "OneStepExtract",
    "OneStepPlan",
    "OneStepLoadLoRA",
    "OneStepLoadControl",
    "OneStepControlPicture",
    "OneStepGeneratorPictures",
    "OneStepOwnControl",
    "OneStepDiversitySigmas",
    "OneStepDoctor",
    "OneStepSample",
    "OneStepFast",
    "OneStepSampler",
    "OneStepSigmas",
    "OneStepNegativeSteering",
    "OneStepEncodeNegative",
    "OneStepApplyGuidanceAdapter",
    "OneStepApplyNegativeAdapter",
}


def test_every_node_is_there_with_tooltips_and_a_help_page(comfy_server: Any, root: Path) -> None:
    known = comfy_server.get("/object_info")
    ours = {name: node for name, node in known.items() if name.startswith("OneStep")}
    assert set(ours) == IDS
    assert "OneStep: the nodes of" not in comfy_server.log()
    for name, node in ours.items():
        assert node["category"].startswith("OneStep/") and node["description"], name
        inputs = {key: value for kind in ("required", "optional") for key, value in node["input"].get(kind, {}).items()}
        silent = [key for key, value in inputs.items() if len(value) < 2 or not value[1].get("tooltip")]
        assert silent == [], f"{name}: no tooltip on {silent}"
        assert (root / "web" / "docs" / f"{name}.md").is_file(), f"{name} has no help page"


def test_every_title_has_a_chinese_one(comfy_server: Any) -> None:
    told = comfy_server.get("/i18n")["zh"]["nodeDefs"]
    assert {name for name in told if name.startswith("OneStep")} == IDS
    assert all(told[name]["display_name"] for name in IDS)


def inputs_of(server: Any, node: str) -> dict[str, Any]:
    told = server.get(f"/object_info/{node}")[node]["input"]
    return {**told.get("required", {}), **told.get("optional", {})}


@pytest.mark.parametrize(("node", "kind"), [("OneStepDistil", "LoRA"), ("OneStepTrainAdapter", "adapter")])
def test_a_trainer_offers_each_method_with_its_own_settings_all_neutral(
    comfy_server: Any, node: str, kind: str
) -> None:
    """As they stand the widgets set nothing: the preset's and the method's own values hold."""
    inputs = inputs_of(comfy_server, node)
    options = {option["key"]: option["inputs"] for option in inputs["method"][1]["options"]}
    makers = {name: method for name, method in METHODS.items() if method.makes == kind}
    assert list(options) == [*(["by preset"] if kind == "LoRA" else []), *makers]
    assert not any(options.get("by preset", {}).values())
    for name, method in makers.items():
        assert list(options[name].get("optional", {})) == [entry.name for entry in described(method.settings)]
    shown = [input for option in options.values() for input in option.get("optional", {}).items()]
    folded = [(name, told) for name, told in inputs.items() if len(told) > 1 and told[1].get("advanced")]
    assert {"batch", "learning_rate", "steps", "existing"} <= {name for name, _ in folded}
    for name, told in [*shown, *folded]:
        assert told[1]["default"] in (-1, "", "by preset", "continue", "none"), name


def test_what_a_person_sets_first_comes_first(comfy_server: Any) -> None:
    inputs = inputs_of(comfy_server, "OneStepDistil")
    seen = [name for name, told in inputs.items() if len(told) > 1 and not told[1].get("advanced")]
    first = ["model", "clip", "vae", "prompts", "preset", "student_steps", "sizes", "name", "method"]
    assert seen == [*first, "unquantized_model"] and list(inputs)[-1] == "unquantized_model"


def test_a_broken_module_is_named_and_the_others_live(run_inside: Any) -> None:
    told = json.loads(run_inside("broken_module").strip().splitlines()[-1])
    assert told["nodes"] and "OneStepLoadTinyModel" in told["nodes"]
    assert "no_such_module" in told["log"]


def text_to_image(name: str, seed: int, steps: int = 4, cfg: float = 3.0) -> dict[str, Any]:
    return {
        "1": {"class_type": "OneStepLoadTinyModel", "inputs": {"name": name}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red dragon", "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["1", 1]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 32, "height": 32, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                **{"seed": seed, "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple"},
                **{
                    "denoise": 1.0,
                    "model": ["1", 0],
                    "positive": ["2", 0],
                    "negative": ["3", 0],
                    "latent_image": ["4", 0],
                },
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "pack"}},
    }


@torch.no_grad()
def drawn_by_diffusers(folder: Path, seed: int, name: str) -> numpy.ndarray[Any, Any]:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "tiny-flow" else {}
    pipe = DiffusionPipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    # Equal steps before the shift, as "simple" takes them; diffusers' own end elsewhere.
    more = {} if name == "tiny" else {"sigmas": [1.0, 0.75, 0.5, 0.25]}
    if name == "tiny-flow":
        more["max_sequence_length"] = 0
    picture = pipe(
        "a red dragon",
        num_inference_steps=4,
        guidance_scale=2.0 if name == "tiny-dit" else 3.0,  # diffusers' Z-Image counts from 0, which is no guidance
        latents=noise,
        width=32,
        height=32,
        output_type="np",
        **more,
    ).images[0]
    return (picture * 255).round()


@pytest.mark.parametrize("name", ["tiny", "tiny-flow", "tiny-dit"])
def test_core_nodes_on_a_tiny_model_draw_diffusers_picture(
    comfy_server: Any, bundled: dict[str, Path], name: str
) -> None:
    finished = comfy_server.run(text_to_image(name, seed=5))
    ours = comfy_server.images(finished, "7")[0][..., :3].astype(float)
    theirs = drawn_by_diffusers(bundled[name], 5, name)
    assert ours.shape == theirs.shape == (32, 32, 3)
    assert abs(ours - theirs).max() <= 1, "8 bit pictures may differ by one rounding"


def test_the_page_shows_what_a_node_says_and_folds_many_settings(comfy_server: Any, root: Path) -> None:
    """A node's text is drawn by the pack's own script, and so is the button for its advanced settings in LiteGraph."""
    script = (root / "web" / "js" / "onestep.js").read_text(encoding="utf-8")
    lists = {
        name: set(re.findall(r'"(OneStep\w+)"', line)) for name, line in re.findall(r"const (\w+) = (\[.*\]);", script)
    }
    lists["TALKERS"] |= lists["TRAINERS"]
    lists["FOLDED"] |= lists["TRAINERS"]
    says = re.compile(r"ui\.PreviewText|ui=\{\"text\"|ui=seen")
    sources = [path.read_text(encoding="utf-8") for path in (root / "nodes").glob("*.py")]
    talking = {name for text in sources if says.search(text) for name in re.findall(r'node_id="(\w+)"', text)}
    assert talking <= lists["TALKERS"], talking - lists["TALKERS"]
    known = comfy_server.get("/object_info")
    many = {
        name
        for name in IDS
        if sum(
            bool(value[1].get("advanced"))
            for kind in known[name]["input"].values()
            for value in kind.values()
            if len(value) > 1
        )
        > 5
    }
    assert many and many <= lists["FOLDED"], many - lists["FOLDED"]
