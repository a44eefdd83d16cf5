"""The shared workflows: the front end loads them whole, they are their API twins, and they run on the tiny model."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import ENDED, QUEUE
from small_runs import settings_node

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]
NAMES = ["control", "distil", "diversity", "guidance-adapter", "negative", "negative-adapter", "sample", "sample-core"]
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
RUNNING = "const b = document.querySelector('.onestep-finish'); return !!b && !b.disabled"


def workflow(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def made_small(server: Any, graph: dict[str, Any], name: str, steps: int = 2) -> dict[str, Any]:
    """The same graph, as short as it can be; its runs are called ``name``, and a second one by its node too."""
    graph = copy.deepcopy(graph) | {"99": settings_node(server, states=1)}
    runs = [(key, node["inputs"]) for key, node in graph.items() if node["class_type"] == "OneStepDistil"]
    for number, (key, inputs) in enumerate(runs):
        inputs |= {"steps": steps, "rank": 2, "teacher_steps": 1, "existing": "restart", "settings": ["99", 0]}
        inputs["name"] = f"{name}-{key}" if number else name
    return graph


@pytest.mark.parametrize("name", NAMES)
def test_templates_are_listed_with_a_thumbnail(comfy_server: Any, pack: Path, root: Path, name: str) -> None:
    assert sorted(comfy_server.get("/workflow_templates")[pack.name]) == NAMES, "the API twins are no templates"
    thumbnail = root / "workflows" / f"{name}.jpg"
    assert thumbnail.read_bytes()[:2] == b"\xff\xd8" and thumbnail.stat().st_size < 200_000


@pytest.fixture(scope="module")
def distilled(comfy_server: Any, root: Path) -> Any:
    """The distil workflow over HTTP, cut short; it makes the LoRA that the sample workflow loads."""
    return comfy_server.run(made_small(comfy_server, workflow(root, "api/distil"), "tiny-one-step"))


def test_distil_runs_over_http(distilled: Any, comfy_server: Any) -> None:
    assert distilled.status == "success", distilled.error
    assert comfy_server.images(distilled, "11")[0].shape == (32, 32, 3)
    assert comfy_server.images(distilled, "4") and comfy_server.images(distilled, "5")


def test_sample_runs_over_http(distilled: Any, comfy_server: Any, root: Path) -> None:
    finished = comfy_server.run(workflow(root, "api/sample"))
    for node in ("8", "11", "14"):
        assert len(comfy_server.images(finished, node)) == 4


def test_the_same_picture_without_a_node_of_ours(distilled: Any, comfy_server: Any, root: Path) -> None:
    """The template's graph, and One-Step Sample's of the same file, prompt and noise: to the last of 255 levels."""
    graph = workflow(root, "api/sample-core")
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


def test_negative_runs_over_http(comfy_server: Any, root: Path) -> None:
    """Both rows start from the same noise; the steered books are less red."""
    finished = comfy_server.run(workflow(root, "api/negative"))
    steered, plain = (comfy_server.images(finished, node) for node in ("8", "11"))
    assert len(steered) == len(plain) == 4
    red = [sum(float(p[..., 0].mean() - p[..., 1:].mean()) for p in row) for row in (steered, plain)]
    assert red[0] < red[1], red


def test_diversity_runs_over_http(comfy_server: Any, root: Path) -> None:
    """It trains four steps, and draws with the base first and without it, from the same noise."""
    graph = made_small(comfy_server, workflow(root, "api/diversity"), "tiny-diversity")
    finished = comfy_server.run(graph)
    first, alone = (comfy_server.images(finished, node) for node in ("14", "17"))
    assert len(first) == len(alone) == 4
    assert all((a != b).mean() > 0.5 for a, b in zip(first, alone, strict=True))


def test_guidance_adapter_runs_over_http(comfy_server: Any, root: Path) -> None:
    """It trains the adapter and draws with it, with CFG and without guidance."""
    graph = made_small(comfy_server, workflow(root, "api/guidance-adapter"), "tiny-guidance")
    finished = comfy_server.run(graph)
    assert all(len(comfy_server.images(finished, node)) == 4 for node in ("11", "14", "17"))
    assert "load it with Apply Guidance Adapter" in finished.outputs["4"]["text"][0]


def test_control_runs_over_http(comfy_server: Any, root: Path) -> None:
    """It trains one step, then the control on it, and draws by a picture's edges."""
    graph = made_small(comfy_server, workflow(root, "api/control"), "tiny-control")
    finished = comfy_server.run(graph)
    assert all(len(comfy_server.images(finished, node)) == 4 for node in ("20", "23"))
    edges = comfy_server.images(finished, "16")[0]
    assert set(edges.flatten().tolist()) == {0, 255} and 20 < int((edges[..., 0] > 0).sum()) < 500
    assert "load it with Load Control Adapter" in finished.outputs["5"]["text"][0]


def test_controls_second_run_is_of_its_firsts_generator(root: Path) -> None:
    """No file is needed that the graph does not make, and what is trained once is not trained again."""
    graph = workflow(root, "api/control")
    assert graph["5"]["inputs"]["initial_lora"] == graph["7"]["inputs"]["lora_name"] == ["3", 3]
    assert graph["6"]["inputs"]["control_name"] == ["5", 3]
    assert graph["3"]["inputs"]["existing"] == graph["5"]["inputs"]["existing"] == "continue"
    assert graph["4"]["inputs"]["control"] == graph["15"]["inputs"]["control"]


def test_negative_adapter_runs_over_http(comfy_server: Any, root: Path) -> None:
    """It trains one step, then the negative adapter beside it; two negatives and none draw three rows of one noise."""
    graph = made_small(comfy_server, workflow(root, "api/negative-adapter"), "tiny-away")
    graph["99"]["inputs"]["learning_rate"] = 0.05  # so that two updates are seen
    finished = comfy_server.run(graph)
    rows = [np.stack(comfy_server.images(finished, node)) for node in ("14", "17", "20")]
    assert all(len(row) == 4 for row in rows)
    assert all((a != b).mean() > 0.02 for a, b in itertools.combinations(rows, 2))
    assert "load it with Apply Negative Adapter" in finished.outputs["5"]["text"][0]


def test_negative_adapters_files_are_those_of_its_own_runs(root: Path) -> None:
    """All three rows are of one student, two of one negative; what is trained once is not trained again."""
    graph = workflow(root, "api/negative-adapter")
    assert graph["5"]["inputs"]["initial_lora"] == graph["6"]["inputs"]["lora_name"] == ["3", 3]
    assert graph["11"]["inputs"]["adapter"] == ["5", 3]
    assert graph["10"]["inputs"]["negative"] == graph["11"]["inputs"]["negative"] == ["8", 0]
    assert [graph[row]["inputs"]["model"] for row in ("12", "15", "18")] == [["6", 0], ["10", 0], ["11", 0]]
    assert graph["10"]["inputs"]["model"] == graph["11"]["inputs"]["model"] == ["6", 0]
    noises = [(graph[row]["inputs"]["seed"], graph[row]["inputs"]["latent_image"]) for row in ("12", "15", "18")]
    assert noises[0] == noises[1] == noises[2]
    assert graph["3"]["inputs"]["existing"] == graph["5"]["inputs"]["existing"] == "continue"


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


@pytest.mark.parametrize("vue", [False, True], ids=["litegraph", "nodes2"])
def test_the_front_end_loads_both_and_shows_a_run(
    distilled: Any, comfy_server: Any, open_page: Any, root: Path, tmp_path: Path, vue: bool
) -> None:
    with open_page(vue) as page:
        for name in reversed(NAMES):
            types = page.load(workflow(root, name))
            assert types and page.script("return window.app.rootGraph._nodes.every(node => !node.has_errors)")
            made, twin = page.asynchronous(TO_PROMPT), workflow(root, f"api/{name}")
            assert {key: node["class_type"] for key, node in made.items()} == {
                k: n["class_type"] for k, n in twin.items()
            }
            for key, node in twin.items():
                assert {i: made[key]["inputs"].get(i) for i in node["inputs"]} == node["inputs"], f"{name}: {key}"
        page.load(made_small(comfy_server, workflow(root, "api/distil"), "in-the-browser", steps=5000))
        page.script(CENTRE)  # off the screen LiteGraph hides a node's widgets
        page.asynchronous(QUEUE)
        page.until(RUNNING, 120)
        page.until("return (document.querySelector('polyline')?.getAttribute('points') || '').includes(' ')", 200)
        page.script("document.querySelector('.onestep-finish').click()")
        page.until(ENDED, 120)
        page.until("return document.querySelector('img.onestep-preview').naturalWidth > 0", 20)
        told = page.script(PANEL)
        page.screenshot(tmp_path / f"run-{vue}.png")
        assert told["idle"] and told["width"] > 100 and told["picture"] > 64, told
        assert told["points"].startswith("0,"), "the curve begins at the untrained model"
        assert "onestep/in-the-browser.safetensors" in told["status"]
        assert page.errors() == []
