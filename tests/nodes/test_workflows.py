"""The shared workflows: the front end loads them whole, they are their API twins, and they run on the tiny model."""

from __future__ import annotations

import copy
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import ENDED, QUEUE
from narrowed import narrowed
from own_pictures import pictures_in
from small_runs import SMALL, small

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]
DISTIL, SAMPLE, NEGATIVE = "1 distil a checkpoint", "2 draw in one step", "4 negative prompt at CFG 1"
CORE, CHAIN = "3 draw with core nodes", "10 a LoRA for each step"
OWN = (
    "11 distil Z-Image",
    "12 distil klein",
    "13 distil Anima",
    "14 distil Qwen-Image",
    "15 distil Krea 2",
    "16 distil Chroma",
    "17 distil Lumina 2",
    "18 distil Wan",
    "21 distil PixArt-Sigma",
)
OWN_LOADERS = {"UNETLoader": "diffusion_models", "CLIPLoader": "text_encoders", "VAELoader": "vae"}
"""What loads a person's own files in those, and from which folder of models."""
# Those that train besides the first: how many pictures stand side by side, and what the node says at the end.
TRAINED = [
    ("5 train a negative adapter", 2, "load it with Apply Negative Adapter"),
    ("6 train a guidance adapter", 3, "load it with Apply Guidance Adapter"),
    ("7 train a control", 3, "load it with Load Control Adapter"),
    ("8 variety from the base", 2, "onestep/tiny-8.safetensors"),
    ("9 adapt a few-step LoRA", 3, "onestep/tiny-9.safetensors"),
    ("19 tune a few-step model", 3, "onestep/tiny-19.safetensors"),
    ("20 tune, then distil again", 3, "onestep/tiny-20.safetensors"),
]
NAMES = sorted([DISTIL, SAMPLE, CORE, NEGATIVE, CHAIN, *OWN, *(name for name, *_ in TRAINED)])
BUNDLED = "bundled-tiny-one-step.safetensors"
TWO = ("bundled-tiny-two-steps.safetensors", "bundled-tiny-two-steps-2.safetensors")
COMES_WITH_IT = (BUNDLED, *TWO, "bundled-tiny-night-style.safetensors")
PICTURES = "my-pictures"
"""The folder of the input folder that a person puts pictures into."""
TRAINERS = ("OneStepDistil", "OneStepTrainAdapter")
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "OneStepSample")
TITLE, PREVIEW, LEAST_WIDTH = 30, 225, 225  # in the front end's pixels
TO_PROMPT = """
const done = arguments[0];
window.app.graphToPrompt().then(made => done(made.output)).catch(error => done(String(error)))"""
PANEL = """
const panel = document.querySelector('.onestep-panel');
if (!panel || !panel.querySelector('polyline')) return null;
const picture = panel.querySelector('img.onestep-preview');
return {status: panel.querySelector('.onestep-status').textContent, width: panel.getBoundingClientRect().width,
        points: panel.querySelector('polyline').getAttribute('points'), picture: picture.naturalWidth,
        idle: panel.querySelector('.onestep-finish').disabled}"""
CENTRE = """
const node = window.app.rootGraph._nodes.find(node => node.type === 'OneStepDistil');
window.app.canvas.ds.scale = 0.8;
window.app.canvas.centerOnNode(node)"""
SET_WIDGET = """
const [name, value] = arguments;
const node = window.app.rootGraph._nodes.find(node => node.type === 'OneStepDistil');
const widget = node.widgets.find(widget => widget.name === name), before = widget.value;
widget.value = value;
return before"""
RUNNING = "const b = document.querySelector('.onestep-finish'); return !!b && !b.disabled"


def workflow(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def made_small(server: Any, graph: dict[str, Any], name: str, steps: int = 2) -> dict[str, Any]:
    """The same graph, as short as it can be; its runs are called ``name``, and a second one by its node too."""
    graph = copy.deepcopy(graph)
    runs = [(key, node["inputs"]) for key, node in graph.items() if node["class_type"] in TRAINERS]
    for number, (key, inputs) in enumerate(runs):
        known = server.get(f"/object_info/{graph[key]['class_type']}")[graph[key]["class_type"]]["input"]["optional"]
        inputs |= {name: value for name, value in SMALL.items() if name in known}
        inputs |= {"steps": steps, "teacher_steps": 1, "existing": "restart"} | ({"rank": 2} if "rank" in known else {})
        inputs |= {"method.states": 1} if inputs["method"] == "agd" else {}
        inputs |= small("dmd", warm_start=0, steps=steps) if inputs.get("preset") == "Adapt" else {}
        inputs["name"] = f"{name}-{key}" if number else name
    return graph


@pytest.fixture(scope="module")
def own_files(comfy_server: Any, root: Path) -> list[Path]:
    """Files of the names that are in the workflows of a person's own; there is nothing in them."""
    made = []
    for node in (node for name in OWN for node in workflow(root, f"api/{name}").values()):
        if node["class_type"] in OWN_LOADERS:
            name = next(value for key, value in node["inputs"].items() if key.endswith("_name"))
            made.append(comfy_server.base / "models" / OWN_LOADERS[node["class_type"]] / name)
            made[-1].parent.mkdir(exist_ok=True)
            made[-1].touch()
    return made


@pytest.mark.parametrize("name", NAMES)
def test_templates_are_listed_with_a_thumbnail(comfy_server: Any, pack: Path, root: Path, name: str) -> None:
    assert sorted(comfy_server.get("/workflow_templates")[pack.name]) == NAMES, "the API twins are no templates"
    thumbnail = root / "workflows" / f"{name}.jpg"
    assert thumbnail.read_bytes()[:2] == b"\xff\xd8" and thumbnail.stat().st_size < 200_000


def test_blueprints_are_served(comfy_server: Any, pack: Path, root: Path) -> None:
    """Each is one node whose subgraph is made of nodes that this ComfyUI has."""
    ours = {
        i: e for i, e in comfy_server.get("/global_subgraphs").items() if e["info"]["node_pack"].endswith(pack.name)
    }
    assert {entry["name"] for entry in ours.values()} == {path.stem for path in (root / "subgraphs").glob("*.json")}
    known = comfy_server.get("/object_info")
    for key in ours:
        told = json.loads(comfy_server.get(f"/global_subgraphs/{key}")["data"])
        (inside,) = told["definitions"]["subgraphs"]
        assert [node["type"] for node in told["nodes"]] == [inside["id"]]
        assert {node["type"] for node in inside["nodes"]} <= set(known)


@pytest.fixture(scope="module")
def distilled(comfy_server: Any, root: Path) -> Any:
    """The first workflow over HTTP, cut short."""
    return comfy_server.run(made_small(comfy_server, workflow(root, f"api/{DISTIL}"), "tiny-one-step"))


def shown(server: Any, finished: Any, title: str = "") -> list[Any]:
    """The pictures of the graph's preview: two or three, one below the other, enlarged eightfold."""
    assert finished.status == "success", finished.error
    found = [out["images"] for out in finished.outputs.values() if "images" in out]
    assert len(found) == 1, "one preview a workflow"
    return [server.pixels(entry)[..., :3].astype(float) for entry in found[0]]


def parts(picture: Any, count: int) -> list[Any]:
    """A stitched picture's parts, 256 pixels high, 8 pixels of white between them."""
    assert picture.shape[:2] == (256 * count + 8 * (count - 1), 256), picture.shape
    return [picture[264 * at : 264 * at + 256] for at in range(count)]


def test_distil_runs_over_http(distilled: Any, comfy_server: Any) -> None:
    drawn = shown(comfy_server, distilled)
    assert len(drawn) == 4
    one, teacher = parts(drawn[0], 2)
    assert (one[::8, ::8].repeat(8, 0).repeat(8, 1) == one).all(), "enlarged, not smoothed"
    assert abs(one - teacher).mean() > 1
    compared = [out for out in distilled.outputs.values() if "a_images" in out]
    assert [len(compared[0][side]) for side in ("a_images", "b_images")] == [4, 4]


def test_sample_draws_with_the_lora_that_comes_with_the_pack(comfy_server: Any, root: Path) -> None:
    """On a fresh installation, and far nearer to the teacher than the base is in one step."""
    graph = workflow(root, f"api/{SAMPLE}")
    assert [n["inputs"]["lora_name"] for n in graph.values() if "lora_name" in n["inputs"]] == [BUNDLED]
    halves = [parts(picture, 2) for picture in shown(comfy_server, comfy_server.run(graph))]
    near = sum(abs(one - teacher).mean() for one, teacher in halves)
    (loader,) = [n for n in graph.values() if n["class_type"] == "OneStepLoadLoRA"]
    loader["inputs"] |= {"lora_name": "none (the model is few-step itself)", "recipe": "sd-turbo-1"}
    bare = [parts(picture, 2) for picture in shown(comfy_server, comfy_server.run(graph))]
    assert near < 0.8 * sum(abs(one - teacher).mean() for one, teacher in bare)


def test_the_same_picture_without_a_node_of_ours(comfy_server: Any, root: Path) -> None:
    """The template's graph, and One-Step Sample's of the same file, prompt and noise: to the last of 255 levels."""
    graph = workflow(root, f"api/{CORE}")
    ours = [node["class_type"] for node in graph.values() if node["class_type"].startswith("OneStep")]
    assert ours == ["OneStepLoadTinyModel"], "but for the bundled model itself"
    core = np.stack(comfy_server.images(comfy_server.run(graph), "8")).astype(int)
    graph["2"] = {"class_type": "OneStepLoadLoRA", "inputs": {**graph["2"]["inputs"], "recipe": "from the file"}}
    graph["2"]["inputs"].pop("strength_model")
    plugs = {name: graph["5"]["inputs"][name] for name in ("model", "positive", "latent_image")}
    seed = graph["5"]["inputs"]["noise_seed"]
    graph["5"] = {"class_type": "OneStepSample", "inputs": {**plugs, "recipe": ["2", 1], "seed": seed}}
    drawn = np.stack(comfy_server.images(comfy_server.run(graph), "8")).astype(int)
    assert core.shape == (4, 256, 256, 3) and np.abs(core - drawn).max() <= 1 and core.std() > 5


def test_a_lora_for_each_step_without_a_node_of_ours(comfy_server: Any, root: Path) -> None:
    """The template's chain, and One-Step Sample's picture of both files: to the last of 255 levels. Each file acts at
    its own step."""
    graph = workflow(root, f"api/{CHAIN}")
    ours = [node["class_type"] for node in graph.values() if node["class_type"].startswith("OneStep")]
    assert ours == ["OneStepLoadTinyModel"], "but for the bundled model itself"
    loaders = {key: node["inputs"] for key, node in graph.items() if "lora_name" in node["inputs"]}
    assert sorted(told["lora_name"] for told in loaders.values()) == sorted(TWO)
    (show,) = [key for key, node in graph.items() if node["class_type"] == "PreviewImage"]
    core = np.stack(comfy_server.images(comfy_server.run(graph), show)).astype(int)
    swapped = copy.deepcopy(graph)
    for key, told in loaders.items():
        swapped[key]["inputs"]["lora_name"] = TWO[told["lora_name"] == TWO[0]]
    other = np.stack(comfy_server.images(comfy_server.run(swapped), show)).astype(int)
    first, second = (next(key for key, told in loaders.items() if told["lora_name"] == name) for name in TWO)
    (start,) = [n["inputs"] for n in graph.values() if n["inputs"].get("add_noise") == "enable"]
    (last,) = [key for key, n in graph.items() if n["inputs"].get("add_noise") == "disable"]
    plugs = {name: start[name] for name in ("positive", "latent_image")}
    loader = {"model": loaders[first]["model"], "lora_name": TWO[0], "recipe": "from the file"}
    graph[first] = {"class_type": "OneStepLoadLoRA", "inputs": loader}
    drawn = {**plugs, "model": [first, 0], "recipe": [first, 1], "seed": start["noise_seed"]}
    graph[last] = {"class_type": "OneStepSample", "inputs": drawn}
    alone = {key: node for key, node in graph.items() if key != second and node["inputs"] is not start}
    drawn = np.stack(comfy_server.images(comfy_server.run(alone), show)).astype(int)
    assert core.shape == (4, 256, 256, 3) and np.abs(core - drawn).max() <= 1 and core.std() > 5
    assert np.abs(core - other).mean() > 1


def test_negative_runs_over_http(comfy_server: Any, root: Path) -> None:
    """Both are drawn from the same noise; the steered books are less red."""
    drawn = [parts(p, 2) for p in shown(comfy_server, comfy_server.run(workflow(root, f"api/{NEGATIVE}")))]
    assert len(drawn) == 4
    red = [sum(float(pair[side][..., 0].mean() - pair[side][..., 1:].mean()) for pair in drawn) for side in (0, 1)]
    assert red[0] < red[1], red


@pytest.mark.parametrize(("name", "count", "words"), narrowed(TRAINED))
def test_a_workflow_that_trains_runs_over_http(
    comfy_server: Any, root: Path, name: str, count: int, words: str
) -> None:
    """Cut short; what is compared differs, and the node says what loads its result."""
    graph = made_small(comfy_server, workflow(root, f"api/{name}"), f"tiny-{name.split()[0]}")
    if not (mine := comfy_server.base / "input" / PICTURES).exists():
        pictures_in(mine)
    for node in graph.values():
        if node["class_type"] in TRAINERS:
            node["inputs"]["learning_rate"] = 0.05  # so that two updates are seen
    finished = comfy_server.run(graph)
    drawn = [parts(picture, count) for picture in shown(comfy_server, finished)]
    assert len(drawn) == 4
    for one, other in itertools.combinations(range(count), 2):
        assert any((picture[one] != picture[other]).mean() > 0.02 for picture in drawn)
    told = [out["text"][0] for key, out in finished.outputs.items() if graph[key]["class_type"] in TRAINERS]
    assert len(told) == 1 + name.startswith("20") and any(words in one for one in told)


@pytest.mark.parametrize("name", NAMES)
def test_it_needs_no_file_that_the_pack_or_the_graph_does_not_bring(root: Path, name: str) -> None:
    """And what was trained once is not trained again."""
    for node in workflow(root, f"api/{name}").values():
        files = {key: node["inputs"].get(key) for key in ("lora_name", "adapter", "control_name", "initial_lora")}
        assert all(isinstance(v, list) or v in (None, "none", *COMES_WITH_IT) for v in files.values()), files
        assert node["inputs"].get("existing", "continue") == "continue"


@pytest.mark.parametrize("name", narrowed(OWN, OWN[0], OWN[-1]))
def test_a_family_of_ones_own_needs_the_names_of_its_files_alone(
    comfy_server: Any, root: Path, own_files: Any, name: str
) -> None:
    """The server takes the graph, and comes as far as what is in the files."""
    graph = workflow(root, f"api/{name}")
    (failed,) = comfy_server.run(graph).named("execution_error")
    assert len(own_files) == 3 * len(OWN) and failed["node_type"] in OWN_LOADERS, failed


@pytest.mark.parametrize("name", NAMES)
def test_what_is_compared_is_drawn_from_the_same_noise(root: Path, name: str) -> None:
    seeds: dict[str, list[int]] = {}
    for node in workflow(root, f"api/{name}").values():
        if node["class_type"] in SAMPLERS:
            told = node["inputs"]
            seeds.setdefault(told["latent_image"][0], []).append(told.get("seed", told.get("noise_seed")))
    assert all(len(set(found)) == 1 for found in seeds.values()), seeds
    assert name in (CORE, CHAIN) or any(len(found) > 1 for found in seeds.values())


def flat(graph: dict[str, Any]) -> dict[str, Any]:
    """An API graph without subgraphs: the page reads no ids like 15:8 from a file."""
    number = {key: str(at) for at, key in enumerate(graph, 1)}

    def renamed(value: Any) -> Any:
        return [number[value[0]], value[1]] if isinstance(value, list) else value

    inputs = {key: {name: renamed(v) for name, v in node["inputs"].items()} for key, node in graph.items()}
    return {number[key]: node | {"inputs": inputs[key]} for key, node in graph.items()}


def box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom with the title, as wide as Nodes 2.0 draws it, with room for a sampler's preview."""
    (x, y), (width, height) = node["pos"], node["size"]
    preview = PREVIEW if node["type"] in SAMPLERS else 0
    return x, y - TITLE, x + max(width, LEAST_WIDTH), y + height + preview


@pytest.mark.parametrize("name", NAMES)
def test_no_node_covers_another(root: Path, name: str) -> None:
    boxes = {node["id"]: box(node) for node in workflow(root, name)["nodes"]}
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{one} and {other} of {name}: {a}, {b}"


PAGES = [
    pytest.param(False, [name for name in NAMES if name not in OWN[1:-1]], id="litegraph"),
    pytest.param(False, OWN, id="litegraph, own files", marks=pytest.mark.broad),
    pytest.param(True, NAMES, id="nodes2", marks=pytest.mark.broad),
]


@pytest.mark.parametrize(("vue", "names"), PAGES)
def test_the_front_end_loads_both_and_shows_a_run(
    distilled: Any, comfy_server: Any, open_page: Any, root: Path, tmp_path: Path, own_files: Any, vue: bool, names: Any
) -> None:
    with open_page(vue) as page:
        for name in reversed(names):
            types = page.load(workflow(root, name))
            assert types and page.script("return window.app.rootGraph._nodes.every(node => !node.has_errors)")
            made, twin = page.asynchronous(TO_PROMPT), workflow(root, f"api/{name}")
            assert {key: node["class_type"] for key, node in made.items()} == {
                k: n["class_type"] for k, n in twin.items()
            }
            for key, node in twin.items():
                assert {i: made[key]["inputs"].get(i) for i in node["inputs"]} == node["inputs"], f"{name}: {key}"
        run = f"in-the-browser-{vue}"
        graph = flat(made_small(comfy_server, workflow(root, f"api/{DISTIL}"), run, steps=5000))
        (trainer,) = (node["inputs"] for node in graph.values() if node["class_type"] in TRAINERS)
        trainer |= {"preview_every": 100_000, "save_every": 100_000}  # so that the buttons alone do it
        page.load(graph)
        page.script(CENTRE)  # off the screen LiteGraph hides a node's widgets
        page.asynchronous(QUEUE)
        page.until(RUNNING, 120)
        page.until("return !!document.querySelector('.onestep-chart polyline')", 200)
        press_sample_and_save(page, comfy_server.base / "output" / "onestep" / run)
        page.script("document.querySelector('.onestep-finish').click()")
        page.until(ENDED, 120)
        page.until("return document.querySelector('img.onestep-preview').naturalWidth > 0", 20)
        told = page.script(PANEL)
        page.screenshot(tmp_path / f"run-{vue}.png")
        assert told["idle"] and told["width"] > 100 and told["picture"] > 64, told
        assert told["points"].startswith("36,"), "the curve begins at the untrained model, on the left axis"
        assert f"onestep/{run}.safetensors" in told["status"]
        assert page.errors() == []
        refused_before_it_runs(page)


def press_sample_and_save(page: Any, folder: Path) -> None:
    """New pictures and a saved state come from the buttons, within the updates that follow."""
    page.script("document.querySelector('.onestep-sample').click()")
    page.until(r"return /after [1-9][\d,]* updates/.test(document.querySelector('.onestep-caption').textContent)", 60)
    drawn = sorted(path.stem for path in (folder / "previews").glob("*.png"))
    assert len(drawn) == 2 and drawn[0] == "000000", drawn
    before = set(folder.glob("state-*"))
    page.until(RUNNING, 60)
    page.script("document.querySelector('.onestep-save').click()")
    deadline = time.monotonic() + 60
    while not {path for path in folder.glob("state-*") if path not in before}:
        assert time.monotonic() < deadline, "no state was saved"
        time.sleep(0.2)


def refused_before_it_runs(page: Any) -> None:
    """A bad name and a bad size: a sentence in ComfyUI's notices and in the panel, and nothing runs."""
    for widget, value, words in (("name", "CON", "Windows keeps the name"), ("sizes", "large", "WIDTHxHEIGHT")):
        before = page.script(SET_WIDGET, widget, value)
        page.asynchronous(QUEUE)
        said = page.until(
            f"return [...document.querySelectorAll('.onestep-notice')].at(-1)?.textContent.includes({words!r})", 30
        )
        assert said and words in page.script("return document.querySelector('.onestep-status').textContent")
        assert page.script("return window.__events") == []
        page.script(SET_WIDGET, widget, before)
