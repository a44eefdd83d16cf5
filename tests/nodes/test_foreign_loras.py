"""LoRA files in others' dialects, in ComfyUI: `Load One-Step LoRA` and a trainer's `initial_lora` read each as the same
file in our own names, layer by layer at its own alpha, or say in words why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_graphs import SEED, distil, graph, latents, saved
from diffusers import DiffusionPipeline
from lora_dialects import alpha_tensors, header, kohya, none, old_diffusers, peft
from lora_files import foreign
from narrowed import narrowed
from torch import Tensor

from onestep.core.families import FAMILIES, bind_diffusers
from onestep.core.lora_file import load_lora, save_lora
from onestep.core.recipe import Recipe
from onestep.core.schedule import FlowSchedule, VPSchedule
from onestep.training.engine.inputs import automatic_start

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]
SCHEDULES = {"tiny": VPSchedule.scaled_linear(), "tiny-flow": FlowSchedule(3.0)}
FAMILY = {"tiny": "unet", "tiny-flow": "sd3"}
State = dict[str, tuple[Tensor, Tensor]]
RANK, SIZE = 3, 0.1


def hosts_rows(name: str, names: list[str]) -> list[Any]:
    """ComfyUI's layers, but for those whose rows it orders otherwise; the last of two places that one name may have."""
    family = FAMILIES[FAMILY[name]]
    rows = family.rows(family.layout_of_canonical(names))
    found = {row.names: row for row in rows if set(row.names) <= set(names)}
    return [row for row in found.values() if not any("norm" in part for part in row.names)]


def comfyui(name: str) -> Callable[[State], dict[str, Tensor]]:
    """ComfyUI's own paths; a fused layer has one A, and the rows of its parts below each other."""

    def written(factors: State) -> dict[str, Tensor]:
        tensors = {}
        for row in hosts_rows(name, list(factors)):
            path = f"diffusion_model.{row.host}"
            tensors[f"{path}.lora_down.weight"] = factors[row.names[0]][0]
            tensors[f"{path}.lora_up.weight"] = torch.cat([factors[part][1] for part in row.names])
        return tensors

    return written


# Whether the dialect has words for every layer; where not, the attention's layers alone are written.
DIALECTS: dict[str, dict[str, Any]] = {
    "tiny": {
        "ComfyUI": (comfyui("tiny"), none),
        "kohya": (kohya("lora_unet_"), alpha_tensors(lambda at, rank: 0.5 + at % 5)),
        "peft": (peft("base_model.model.", "style_0"), none),
        "diffusers": (peft("unet."), header("unet", lambda f: {"lora_alpha": 6}, lambda at, rank: 6 / rank)),
        "old diffusers": (old_diffusers, none),
    },
    "tiny-flow": {
        "ComfyUI": (comfyui("tiny-flow"), none),
        "OneTrainer": (kohya("lora_transformer_"), alpha_tensors(lambda at, rank: 1.0 + at % 3)),
        "ai-toolkit": (peft("diffusion_model."), none),
        "dots": (kohya("transformer.", str), alpha_tensors(lambda at, rank: 2.0)),
    },
}


def factors_of(name: str, targets: dict[str, Any], attention: bool) -> State:
    """Factors large enough to be seen, one A for what ComfyUI fuses."""
    draw, factors = torch.Generator().manual_seed(3), State()
    for row in hosts_rows(name, list(targets)):
        if attention and not all(".attn" in part for part in row.names):
            continue
        a = SIZE * torch.randn(targets[row.names[0]].shape_a(RANK), generator=draw)
        factors |= {n: (a, SIZE * torch.randn(targets[n].shape_b(RANK), generator=draw)) for n in row.names}
    return factors


@pytest.fixture(scope="module", params=list(DIALECTS))
def case(request: Any, comfy_server: Any, bundled: dict[str, Path]) -> tuple[str, list[tuple[str, str]]]:
    """A model's name, and by dialect (that file, the same LoRA in our own names), in models/loras/foreign."""
    name, folder, files = request.param, comfy_server.base / "models" / "loras" / "foreign", []
    folder.mkdir(parents=True, exist_ok=True)
    schedule, absent = SCHEDULES[name], {"text_encoder_3": None, "tokenizer_3": None} if name == "tiny-flow" else {}
    pipe = DiffusionPipeline.from_pretrained(bundled[name], **absent)
    targets = {target.name: target for target in bind_diffusers(pipe.unet if name == "tiny" else pipe.transformer)}
    recipe = Recipe.for_student(schedule, 1, FAMILY[name], ((32, 32),), automatic_start(schedule, 1)).to_json()
    for number, (dialect, (written, alphas)) in enumerate(DIALECTS[name].items()):
        factors = factors_of(name, targets, attention=dialect == "old diffusers")
        (tensors, told), scales = alphas(written(factors), factors)
        scaled = {n: (a, b * scales[n]) for n, (a, b) in factors.items()}
        theirs, ours = f"{name}-{number}-theirs.safetensors", f"{name}-{number}-ours.safetensors"
        foreign(folder / theirs, tensors, {**told, "onestep.recipe": recipe})
        save_lora(folder / ours, scaled, FAMILY[name], recipe)
        files.append((f"foreign/{theirs}", f"foreign/{ours}"))
    return name, files


def drawn_with(file: str) -> dict[str, Any]:
    loaded = {"model": ["model", 0], "lora_name": file, "recipe": "from the file"}
    plugs = {"model": [f"lora {file}", 0], "recipe": [f"lora {file}", 1], "seed": SEED}
    plugs |= {"positive": ["positive", 0], "latent_image": ["empty", 0]}
    return {
        f"lora {file}": {"class_type": "OneStepLoadLoRA", "inputs": loaded},
        file: {"class_type": "OneStepSample", "inputs": plugs},
    }


def drawn_by_core(file: str) -> dict[str, Any]:
    """By ComfyUI's own loader, which knows the first dialect as well."""
    loaded = {"model": ["model", 0], "lora_name": file, "strength_model": 1.0}
    nodes = drawn_with(file)
    plugs = nodes[file]["inputs"] | {"model": ["core's lora", 0]}
    return {
        "core's lora": {"class_type": "LoraLoaderModelOnly", "inputs": loaded},
        "core": {"class_type": "OneStepSample", "inputs": plugs},
    }


def test_every_layer_acts_as_in_our_own_names(case: Any, comfy_server: Any) -> None:
    name, files = case
    nodes = {key: node for pair in files for file in pair for key, node in drawn_with(file).items()}
    nodes |= drawn_by_core(files[0][0])
    drawn = latents(comfy_server, graph(name, 32, **nodes))
    for (theirs, ours), dialect in zip(files, DIALECTS[name], strict=True):
        torch.testing.assert_close(drawn[theirs], drawn[ours], rtol=1e-4, atol=1e-4, msg=dialect)
    torch.testing.assert_close(drawn["core"], drawn[files[0][1]], rtol=1e-4, atol=1e-4, msg="core's own loader")
    assert len({round(float(drawn[ours].sum()), 3) for _, ours in files}) > 1, "the alphas act"


def started_at(file: str, model: str, run: str) -> dict[str, Any]:
    """A run from this file whose one update moves next to nothing."""
    node = distil(model, "regression", steps=1, rank=RANK, initial_lora=file, learning_rate=1e-7)
    return node | {"inputs": node["inputs"] | {"name": run}}


@pytest.mark.broad
def test_a_trainer_begins_at_every_layer_of_it(case: Any, comfy_server: Any) -> None:
    name, files = case
    folder, chosen = comfy_server.base / "models" / "loras", list(zip(DIALECTS[name], files, strict=True))[:2]
    runs = {f"run {at}": started_at(theirs, name, f"{name}-{at}") for at, (_, (theirs, _)) in enumerate(chosen)}
    finished = comfy_server.run(graph(name, 32, **runs))
    assert finished.status == "success", finished.error
    for at, (dialect, (_, ours)) in enumerate(chosen):
        made, wanted = (load_lora(folder / file).state for file in (f"onestep/{name}-{at}.safetensors", ours))
        for layer, (a, b) in wanted.items():
            product, found = (y.flatten(1) @ x.flatten(1) for x, y in ((a, b), made[layer]))
            close = {"rtol": 0, "atol": 1e-4 * float(product.abs().max())}
            torch.testing.assert_close(found, product, **close, msg=f"{dialect}: {layer}")


def unknown_kinds() -> dict[str, tuple[dict[str, Tensor], str]]:
    ones, path = torch.ones, "lora_unet_mid_block_attentions_0_proj_in"
    plain = {f"{path}.lora_down.weight": ones(2, 64), f"{path}.lora_up.weight": ones(64, 2)}
    loha = {f"{path}.hada_{part}": ones(2, 64) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
    elsewhere = {key.replace("mid_block", "down_blocks_9"): value for key, value in plain.items()}
    return {
        "loha": (loha, "LoHa"),
        "dora": ({**plain, f"{path}.dora_scale": ones(64, 1)}, "DoRA"),
        "no such layer": ({**plain, **elsewhere}, "down_blocks_9"),
        "a factor too few": ({f"{path}.lora_down.weight": ones(2, 64)}, "lacks one"),
    }


@pytest.mark.parametrize("kind", narrowed(list(unknown_kinds()), "loha", "a factor too few"))
def test_what_no_layer_can_take_is_refused_in_words_by_both_nodes(comfy_server: Any, kind: str) -> None:
    tensors, words = unknown_kinds()[kind]
    folder = comfy_server.base / "models" / "loras" / "foreign"
    folder.mkdir(parents=True, exist_ok=True)
    foreign(folder / f"{kind}.safetensors", tensors)
    file = f"foreign/{kind}.safetensors"
    loading = drawn_with(file)
    loading[f"lora {file}"]["inputs"]["recipe"] = "sd-turbo-1"
    run = started_at(file, "tiny", "refused")
    for nodes in ({**loading, "save": saved(file)}, {"run": run}):
        refused = comfy_server.run(graph("tiny", 32, **nodes))
        assert refused.status == "error" and words in refused.error, refused.error
        assert len(refused.error) < 500 and str(comfy_server.base) not in refused.error
