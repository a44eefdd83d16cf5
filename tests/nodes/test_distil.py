"""The distillation node in a running server: it trains, resumes, stops, finishes early, refuses what it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_support import GraphRefused
from narrowed import narrowed
from small_runs import small

from onestep.core.lora_file import load_lora
from onestep.core.recipe import Recipe
from onestep.training.runs.run import Run

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]

PROMPTS = "a red dragon\na blue wall\na wall"


def distil_node(name: str, finer: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    plugs = {"model": ["model", 0], "clip": ["model", 1], "vae": ["model", 2], "prompts": PROMPTS}
    plan = {"preset": "Balanced", "steps": 3, "student_steps": "1", "rank": 2, "sizes": "32x32"}
    more = {"teacher_steps": 2, "guidance": 2.0, "name": name, "existing": "continue"}
    method = "regression" if changes.get("preset") == "Fast" else "dmd"
    told = {**small(method, **(finer or {})), **plugs, **plan, **more, **changes}
    return {"class_type": "OneStepDistil", "inputs": told}


def graph(name: str, model: str = "tiny", finer: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"class_type": "OneStepLoadTinyModel", "inputs": {"name": model}},
        "distil": distil_node(name, finer, **changes),
    }


def lora_of(server: Any, name: str) -> Any:
    return load_lora(server.base / "models" / "loras" / "onestep" / f"{name}.safetensors")


def run_of(server: Any, name: str) -> Run:
    return Run(server.base / "output" / "onestep" / name)


@pytest.fixture(scope="module")
def plain(comfy_server: Any) -> Any:
    """One finished run of the tiny U-Net, to which the others are compared."""
    preview = {"class_type": "SaveImage", "inputs": {"images": ["distil", 3], "filename_prefix": "preview"}}
    finished = comfy_server.run(graph("plain") | {"preview": preview})
    assert finished.status == "success", finished.error
    return finished


def measured(finished: Any) -> list[dict[str, Any]]:
    """What the run said with numbers: of its untrained student, and of its updates."""
    return [data for data in finished.named("onestep.progress") if data["numbers"]]


def test_what_comes_before_the_updates_is_told_too(plain: Any) -> None:
    """Each phase by a word and how far it is, from the first event on; how long it takes is not known yet."""
    told = plain.named("onestep.progress")
    before = told[: told.index(measured(plain)[0])]
    assert before and all(data["phase"] and 0 <= data["done"] <= data["of"] for data in before)
    assert all(data["eta"] is None for data in before)
    assert any("prompt" in data["phase"] for data in before), [data["phase"] for data in before]


def test_a_run_learns_shows_itself_and_leaves_a_lora(plain: Any, comfy_server: Any) -> None:
    lora = lora_of(comfy_server, "plain")
    assert lora.family == "unet" and any(bool(b.any()) for _, b in lora.state.values())
    recipe = Recipe.from_json(lora.recipe)
    assert recipe.steps == 1 and recipe.sizes == ((32, 32),)
    told = measured(plain)
    assert [data["update"] for data in told][-1] == told[-1]["total"] == 6  # 2 warm start, 1 critic, 3 of the method
    assert all(data["node"] == "distil" and data["name"] == "plain" for data in told)
    assert all(data["eta"] is None or data["eta"] >= 0 for data in told)
    # the chart begins at the untrained model and ends with the run, as the pictures do
    assert told[0]["update"] == 0 and all({"distance", "variety"} <= set(told[at]["numbers"]) for at in (0, -1))
    pictures = [data["preview"] for data in told if data["preview"]]
    assert [picture["filename"] for picture in (pictures[0], pictures[-1])] == ["000000.png", "000006.png"]
    last = comfy_server.pixels(pictures[-1]).astype(int)
    assert last.shape[0] > 64
    assert plain.outputs["distil"]["onestep_preview"] == [pictures[-1]]
    # in [0, 1] and back the node's IMAGE is that picture, to a rounding
    assert abs(comfy_server.images(plain, "preview")[0].astype(int) - last).max() <= 1
    assert plain.previews, "previews also go through ComfyUI's own channel"
    assert plain.outputs["distil"]["text"][0].startswith("onestep/plain.safetensors")
    assert "ComfyUI" in plain.outputs["distil"]["text"][0]


def test_the_loaders_list_the_result(plain: Any, comfy_server: Any) -> None:
    known = comfy_server.get("/object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"]
    options = known[0] if isinstance(known[0], list) else known[1]["options"]
    assert "onestep/plain.safetensors" in [option.replace("\\", "/") for option in options]


@pytest.mark.broad
def test_a_second_queue_does_what_existing_says(plain: Any, comfy_server: Any) -> None:
    before = lora_of(comfy_server, "plain").state
    updates = len(run_of(comfy_server, "plain").metrics())
    again = comfy_server.run(graph("plain"))
    assert again.status == "success" and len(run_of(comfy_server, "plain").metrics()) == updates
    stopped = comfy_server.run(graph("plain", existing="stop"))
    assert stopped.status == "error" and "a run is already in output/onestep/plain:" in stopped.error
    other = comfy_server.run(graph("plain", seed=1))
    assert other.status == "error" and "seed" in other.error and "restart" in other.error
    anew = comfy_server.run(graph("plain", existing="restart"))
    assert anew.status == "success" and measured(anew)[-1]["total"] == 6
    after = lora_of(comfy_server, "plain").state
    assert all(torch.equal(x, y) for name in before for x, y in zip(before[name], after[name], strict=True))


def test_cancel_keeps_what_is_learnt_and_the_run_goes_on(plain: Any, comfy_server: Any) -> None:
    """Early enough that the interrupt, which comes over the network, finds it at work."""

    def cancel(name: str, data: dict[str, Any], prompt_id: str) -> None:
        if name == "onestep.progress" and data["update"] >= 2:  # not every update is told
            comfy_server.interrupt(prompt_id)

    cut = comfy_server.run(graph("cut"), on_event=cancel)
    assert cut.named("execution_interrupted"), cut.status
    run = run_of(comfy_server, "cut")
    at = run.states()[-1]
    assert 2 <= at < measured(plain)[-1]["total"]
    partial = load_lora(run.folder / "partial.safetensors")
    assert partial.state.keys() == lora_of(comfy_server, "plain").state.keys()
    shown = comfy_server.run(graph("cut"))
    assert shown.status == "success", shown.error
    assert measured(shown)[0]["update"] == at + 1
    assert not (run.folder / "partial.safetensors").exists()
    whole, resumed = lora_of(comfy_server, "plain").state, lora_of(comfy_server, "cut").state
    assert all(torch.equal(x, y) for name in whole for x, y in zip(whole[name], resumed[name], strict=True))


def test_the_buttons_do_what_they_say_and_a_finished_run_stays_finished(comfy_server: Any) -> None:
    asked: dict[str, int] = {}

    def press(name: str, data: dict[str, Any], prompt_id: str) -> None:
        if name == "onestep.progress":
            for word, update in (("sample", 2), ("save", 2), ("finish", 5)):
                if data["update"] >= update and word not in asked:
                    asked[word] = data["update"]
                    assert comfy_server.post(f"/onestep/{word}", {"name": "early"}) == {"asked": True}

    rare = {"preview_every": 1000, "save_every": 1000, "watch_every": 1000}
    finished = comfy_server.run(graph("early", finer=rare, steps=500), on_event=press)
    assert finished.status == "success", finished.error
    assert "finished early" in finished.outputs["distil"]["text"][0]
    drawn = [data["update"] for data in finished.named("onestep.progress") if data["preview"]]
    assert any(asked["sample"] <= update <= asked["finish"] for update in drawn), (asked, drawn)
    assert lora_of(comfy_server, "early").state
    updates = len(run_of(comfy_server, "early").metrics())
    again = comfy_server.run(graph("early", finer=rare, steps=500))
    assert again.status == "success" and len(run_of(comfy_server, "early").metrics()) == updates
    more = comfy_server.run(graph("early", finer=rare, steps=10, rank=2))
    assert more.status == "success" and len(run_of(comfy_server, "early").metrics()) > updates
    for body in ({"name": "early"}, {"name": "../early"}, {"name": ["early"]}):
        with pytest.raises(GraphRefused, match="404"):
            comfy_server.post("/onestep/finish", body)
    with pytest.raises(GraphRefused, match="400"):
        comfy_server.post("/onestep/finish", {"path": "early"})


def test_the_flow_model_is_distilled_too(comfy_server: Any) -> None:
    finished = comfy_server.run(graph("flow", "tiny-flow", preset="Fast", steps=2, student_steps="2"))
    assert finished.status == "success", finished.error
    recipe = Recipe.from_json(lora_of(comfy_server, "flow").recipe)
    assert recipe.family == "sd3" and recipe.steps == 2


def with_patch(workflow: dict[str, Any], node: str, **values: Any) -> dict[str, Any]:
    workflow["patch"] = {"class_type": node, "inputs": {"model": ["model", 0], **values}}
    workflow["distil"]["inputs"]["model"] = ["patch", 0]
    return workflow


@pytest.mark.parametrize(
    ("node", "values", "word"),
    [
        ("HyperTile", {"tile_size": 32, "swap_size": 2, "max_depth": 0, "scale_depth": False}, "attn1_patch"),
        ("RescaleCFG", {"multiplier": 0.7}, "sampler_cfg_function"),
        ("FreeU_V2", {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}, "output_block_patch"),
    ],
)
def test_patches_on_the_teacher_are_refused_by_name(comfy_server: Any, node: str, values: Any, word: str) -> None:
    refused = comfy_server.run(with_patch(graph("patched"), node, **values))
    assert word in refused.error and len(refused.error) < 400
    assert not (comfy_server.base / "output" / "onestep" / "patched").exists()


@pytest.mark.parametrize(
    ("changes", "finer", "words"),
    [
        ({"prompts": ["text", 0]}, {}, "prompts"),
        ({}, {"accumulation": 3}, "accumulation"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(comfy_server: Any, changes: Any, finer: Any, words: str) -> None:
    before = sorted((comfy_server.base / "output").rglob("*"))
    told = graph(**{"name": "bad", **changes}, finer=finer)
    told["text"] = {"class_type": "PrimitiveStringMultiline", "inputs": {"value": " \n "}}  # known only as it runs
    refused = comfy_server.run(told)
    assert words in refused.error and len(refused.error) < 400, refused.error
    assert sorted((comfy_server.base / "output").rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "../escape"}, "no name of a file"),
        ({"name": "people/../../escape"}, "no name of a file"),
        ({"name": ".hidden"}, "begins with a"),
        ({"name": "nul"}, "Windows"),
        ({"name": "people/COM\u00b9.old"}, "Windows"),
        ({"name": "a:b"}, "':'"),
        ({"name": "plain/inside"}, "a run 'plain'"),
        ({"prompts": " \n "}, "prompts"),
        ({"prompts": "x" * 10_000}, "Shorten"),
        ({"sizes": "33x32"}, "33x32"),
        ({"sizes": "large"}, "large"),
    ],
)
def test_what_no_run_can_be_made_of_is_refused_as_it_is_queued(
    plain: Any, comfy_server: Any, changes: Any, words: str
) -> None:
    before = sorted((comfy_server.base / "output").rglob("*"))
    with pytest.raises(GraphRefused) as refused:
        comfy_server.run(graph(**{"name": "bad", **changes}))
    assert words in str(refused.value) and str(comfy_server.base) not in str(refused.value)
    assert sorted((comfy_server.base / "output").rglob("*")) == before


@pytest.mark.parametrize("name", narrowed(["龙/一步", "люди 2", "हिन्दी"], "龙/一步"))
def test_a_name_may_be_of_any_script_and_in_a_subfolder(comfy_server: Any, name: str) -> None:
    finished = comfy_server.run(graph(name, preset="Fast", steps=1))
    assert finished.status == "success", finished.error
    assert finished.outputs["distil"]["text"][0].startswith(f"onestep/{name}.safetensors")
    assert lora_of(comfy_server, name).state and run_of(comfy_server, name).states()


@pytest.mark.parametrize(
    "changes", [{"rank": 513}, {"rank": -2}, {"method": "magic"}, {"initial_lora": "../secret.safetensors"}]
)
def test_what_no_widget_offers_is_refused_by_the_server(comfy_server: Any, changes: Any) -> None:
    with pytest.raises(GraphRefused):
        comfy_server.run(graph("bad", **changes))


@pytest.mark.slow
@pytest.mark.parametrize("kind", narrowed(["sd15", "sd3", "flux"], "flux"))
def test_checkpoints_of_each_layout_are_distilled_and_loaded_by_core(server_with_checkpoints: Any, kind: str) -> None:
    """A few steps of the whole method; then core's own LoraLoader takes every key of the file."""
    server, text = server_with_checkpoints, "sd3" if kind == "flux" else kind
    workflow = graph(
        f"from-{kind}", finer={"matching_guidance": 1.0 if kind == "flux" else 2.0}, sizes="64x64", steps=1
    )
    workflow["model"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"tiny_{kind}.safetensors"}}
    workflow["text"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"tiny_{text}.safetensors"}}
    workflow["distil"]["inputs"]["clip"] = ["text", 1]
    finished = server.run(workflow)
    assert finished.status == "success", finished.error
    assert "ComfyUI" in finished.outputs["distil"]["text"][0]
    logged = len(server.log())
    told = {"lora_name": f"onestep/from-{kind}.safetensors", "strength_model": 1.0, "strength_clip": 0.0}
    loaded = {
        **{key: workflow[key] for key in ("model", "text")},
        "lora": {"class_type": "LoraLoader", "inputs": {**told, "model": ["model", 0], "clip": ["text", 1]}},
        "prompt": {"class_type": "CLIPTextEncode", "inputs": {"text": "a wall", "clip": ["text", 1]}},
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "sample": {
            "class_type": "KSampler",
            "inputs": {
                **{"seed": 3, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0},
                **{
                    "model": ["lora", 0],
                    "positive": ["prompt", 0],
                    "negative": ["prompt", 0],
                    "latent_image": ["empty", 0],
                },
            },
        },
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["model", 2]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": kind}},
    }
    assert server.images(server.run(loaded), "save")[0].shape == (64, 64, 3)
    assert "lora key not loaded" not in server.log()[logged:] and "NOT LOADED" not in server.log()[logged:]
    assert "ERROR lora" not in server.log()[logged:]


def test_prompts_come_from_files_and_pictures(comfy_server: Any) -> None:
    (comfy_server.base / "input" / "some.txt").write_text("a red dragon\n\na wall\na wall\n", encoding="utf-8")
    picture = comfy_server.run(saved_picture())
    entry = picture.outputs["save"]["images"][0]
    (comfy_server.base / "input" / "drawn.png").write_bytes(
        (comfy_server.base / "output" / entry["subfolder"] / entry["filename"]).read_bytes()
    )
    for file, expected in (("some.txt", "2 prompts:\na red dragon\na wall"), ("drawn.png", "1 prompts:\na green cave")):
        finished = comfy_server.run(listed(file))
        assert finished.outputs["list"]["text"] == [expected], finished.error
    for file in ("../secret.txt", "/etc/passwd", "absent.txt"):
        with pytest.raises(GraphRefused, match="input folder") as refused:
            comfy_server.run(listed(file))
        assert str(comfy_server.base) not in str(refused.value)


def saved_picture() -> dict[str, Any]:
    widgets = {"seed": 1, "steps": 1, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    plugs = {"model": ["model", 0], "positive": ["yes", 0], "negative": ["no", 0], "latent_image": ["empty", 0]}
    return {
        "model": {"class_type": "OneStepLoadTinyModel", "inputs": {"name": "tiny"}},
        "yes": {"class_type": "CLIPTextEncode", "inputs": {"text": "a green\ncave", "clip": ["model", 1]}},
        "no": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurred", "clip": ["model", 1]}},
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 32, "height": 32, "batch_size": 1}},
        "sample": {"class_type": "KSampler", "inputs": widgets | plugs},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["model", 2]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "prompted"}},
    }


def listed(file: str) -> dict[str, Any]:
    return {
        "list": {"class_type": "OneStepPromptList", "inputs": {"text": "", "file": file, "unique": True}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["list", 0]}},
    }
