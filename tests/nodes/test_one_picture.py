"""One file, one noise, one picture, on every layout: core's nodes by the values that `onestep inspect` prints,
diffusers alone by its lines, One-Step Sample, OneStepPipeline and `onestep generate`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import layout_pipelines as layouts
import numpy as np
import pytest
import small_networks as small
import torch
from lora_files import random_lora
from narrowed import narrowed
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from onestep.cli import generate
from onestep.cli.inspect import describe
from onestep.cli.lora import read_lora
from onestep.cli.main import main
from onestep.cli.model import open_host
from onestep.cli.parser import parse
from onestep.core.families import FAMILIES
from onestep.core.lora_file import load_lora
from onestep.core.lora_second import second_file
from onestep.core.recipe import Recipe
from onestep.core.schedule import FlowSchedule, NoiseSchedule, VPSchedule
from onestep.pipelines.adapt import adapt
from onestep.pipelines.one_step import OneStepPipeline
from onestep.training.engine.inputs import automatic_start

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore")]
SEED, PROMPT, SIZE = 11, "a red cat", (layouts.SIDE, layouts.SIDE)
TOLERANCE = 1e-5
"""Of the latents' standard deviation, where alpha is not much below 0.4: an answer in float32 has errors of some 1e-7
of the input, and x0 = (x - sigma eps) / alpha divides them by alpha."""
KINDS = {"sd15": ("unet", "SD15"), "sdxl": ("unet", "SDXL"), "sd3": ("sd3", "SD3"), "flux": ("flux", "Flux")}
KINDS |= {"z_image": ("z_image", "ZImage"), "flux2": ("flux2", "Flux2"), "anima": ("anima", "Anima")}
KINDS |= {"qwen_image": ("qwen_image", "QwenImage"), "chroma": ("chroma", "Chroma"), "lumina2": ("lumina2", "Lumina2")}
KINDS |= {"wan": ("wan", "WAN21_T2V"), "krea2": ("krea2", "Krea2")}
OF_VIDEO = ("anima", "qwen_image", "wan", "krea2")
CONFIG = {
    **small.IN_COMFY,
    "flux2": {**small.IN_COMFY["flux2"], "guidance_embed": False},
    "sdxl": {**small.IN_COMFY["sdxl"], "adm_in_channels": 6 * 256 + 16},
}
SCHEDULES: dict[str, NoiseSchedule] = {"unet": VPSchedule.scaled_linear(), "sd3": FlowSchedule(3.0)}
SCHEDULES |= {"flux": FlowSchedule(), "z_image": FlowSchedule(3.0), "flux2": FAMILIES["flux2"].schedule}
SCHEDULES |= {
    "anima": FlowSchedule(3.0),
    "qwen_image": FAMILIES["qwen_image"].schedule,
    "chroma": FlowSchedule(),
    "lumina2": FlowSchedule(6.0),
    "wan": FAMILIES["wan"].schedule,
}
SCHEDULES["krea2"] = FlowSchedule(math.exp(1.15))


def size_of(case: str) -> tuple[int, int]:
    """Autoencoders of videos have eight pixels a latent, and Lumina 2's, the others two."""
    return (64, 64) if case in (*OF_VIDEO, "lumina2") else SIZE


def recipes(case: str) -> dict[str, Recipe]:
    """By the LoRA's file: the automatic start, a lower one that no scheduler of ComfyUI visits, and pure noise."""
    family, student = KINDS[case][0], Recipe.for_student
    schedule = SCHEDULES[family]
    starts = {"automatic": automatic_start(schedule, 1), "lower": 0.57, "noise": 1.0}
    starts = starts if case != "chroma" else {"noise": 1.0}  # of 57 blocks
    return {
        f"{name}.safetensors": student(schedule, 1, family, (size_of(case),), start) for name, start in starts.items()
    }


@pytest.fixture(scope="module")
def drawn(run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory, request: Any) -> Any:
    """(folder, what ComfyUI drew by "case" and then "file|way"), of the cases that are to be tested."""
    folder, tested = (
        tmp_path_factory.mktemp("picture"),
        [item for item in request.session.items if item.path == request.path],
    )
    asked = {item.callspec.params["case"] for item in tested if hasattr(item, "callspec")}
    kinds = [case for case in KINDS if case in asked]
    for case in kinds:
        (family, kind), pipe, loras = KINDS[case], layouts.make(case), {}
        for name, recipe in recipes(case).items():
            size = 0.2 if case == "wan" else 0.08
            file = random_lora(pipe, folder / f"{case}-{name}", recipe, size, loader="comfyui")
            if second := second_file(file, family, "comfyui"):
                random_lora(pipe, second, recipe, size)
            loras[file.name] = describe(load_lora(file), file)["comfyui"]
        network = layouts.network(pipe)
        save_file(network.state_dict(), folder / f"{case}.weights.safetensors")
        save_file(layouts.embedded(pipe, PROMPT), folder / f"{case}.cond.safetensors")
        told = {"family": family, "kind": kind, "unet_config": CONFIG[case], "loras": loras, "seed": SEED}
        told |= {"side": size_of(case)[0], "shape": shape_of(pipe, case)}
        (folder / f"{case}.json").write_text(json.dumps(told))
        pipe.save_pretrained(str(folder / case))
    run_inside("one_picture", folder, *kinds)
    return folder, {case: load_file(folder / f"{case}.out.safetensors") for case in kinds}


def shape_of(pipe: Any, case: str) -> list[int]:
    """Of an empty latent in ComfyUI."""
    shape = [1, *adapt(pipe).latent_shape(size_of(case))]
    return [*shape[:2], 1, *shape[2:]] if case in OF_VIDEO else shape


CASES = [(case, name.removesuffix(".safetensors")) for case in KINDS for name in recipes(case)]
KEPT = [("sd15", "automatic"), ("sd15", "lower"), ("z_image", "automatic"), ("flux2", "noise")]


@pytest.mark.parametrize(
    ("case", "name"),
    narrowed(CASES, *KEPT),
)
def test_one_file_and_one_noise_draw_one_picture(drawn: Any, case: str, name: str) -> None:
    folder, found = drawn[0], drawn[1][case]
    file = folder / f"{case}-{name}.safetensors"
    ways = {way.split("|")[1]: latent for way, latent in found.items() if way.startswith(file.name)}
    without = ways.pop("without", None)
    ways |= {"diffusers": by_diffusers(case, file), "generate": by_generate(folder / case, file, size_of(case))}
    pipe = OneStepPipeline.from_pipe(layouts.make(case))
    pipe.load_one_step_lora(file)
    ours = pipe(PROMPT, seed=SEED, output_type="latent").images
    ways = {way: latent.reshape(ours.shape) for way, latent in ways.items()}
    assert {"ManualSigmas", "One-Step Sample"} <= ways.keys() and ("KSampler" in ways or name == "lower")
    scale, recipe = float(ours.std()), recipes(case)[f"{name}.safetensors"]
    apart = {way: float((latent - ours).abs().max()) / scale for way, latent in ways.items()}
    assert max(apart.values()) < tolerance(recipe), apart
    if without is not None:
        assert float((without.reshape(ours.shape) - ours).abs().max()) > 0.3 * scale, "the LoRA's effect must be seen"


def tolerance(recipe: Recipe) -> float:
    """A network that predicts noise divides its errors by alpha; the modern families' hosts agree to 1e-5 in one
    answer."""
    if recipe.family in ("z_image", "flux2", "chroma", "lumina2", *OF_VIDEO):
        return 5 * TOLERANCE
    lam = recipe.log_snr[0]
    if recipe.family != "unet" or lam is None:
        return TOLERANCE
    return TOLERANCE * max(1.0, 0.37 * math.hypot(1, math.exp(-lam)))


def by_diffusers(case: str, file: Path) -> Tensor:
    """The lines that `onestep inspect` prints, as they are, but for a latent's output and the seed."""
    *lines, call = describe(load_lora(file), file)["diffusers"]
    pipe = layouts.make(case)
    names: dict[str, Any] = {"pipe": pipe, "diffusers": diffusers, "torch": torch}
    torch.manual_seed(SEED)  # the noise is the first that is drawn
    exec("\n".join(lines), names)
    if case == "anima":
        return eval(call.replace("your prompt", PROMPT).replace('"images"', '"latents"'), names)
    if case == "wan":
        return eval(call.replace("your prompt", PROMPT).replace("'pil'", "'latent'"), names).frames
    call = call.replace("your prompt", PROMPT).removesuffix(")") + ', output_type="latent")'
    latents = eval(call, names).images
    if case == "flux2":
        return folded(pipe, latents)
    if case == "krea2":
        return pipe._unpack_latents(latents, *size_of(case))
    packed = case in ("flux", "qwen_image", "chroma")
    return pipe._unpack_latents(latents, *size_of(case), pipe.vae_scale_factor) if packed else latents


def folded(pipe: Any, latents: Tensor) -> Tensor:
    """FLUX.2's pipelines give the autoencoder's latents, not the network's."""
    mean, variance = (value[None, :, None, None] for value in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var))
    return (pipe._patchify_latents(latents) - mean) / (variance + pipe.vae.config.batch_norm_eps).sqrt()


def by_generate(folder: Path, file: Path, size: tuple[int, int]) -> Tensor:
    """What the command draws, before it is decoded."""
    words = ["generate", str(folder), "--lora", str(file), "--prompt", PROMPT, "--seed", str(SEED), "--out", "x.png"]
    host = open_host(str(folder), device="cpu")
    try:
        return generate.draw(host, [PROMPT], read_lora(str(file), host), parse(words), size)[0]
    finally:
        host.release()


@pytest.mark.parametrize("case", ["sd15", "sd3"])
def test_the_commands_picture_is_the_pipelines(case: str, drawn: Any, tmp_path: Path) -> None:
    """To the last of 255 levels."""
    folder, out = drawn[0], tmp_path / "a.png"
    file = folder / f"{case}-automatic.safetensors"
    draw = ["generate", folder / case, "--lora", file, "--prompt", PROMPT, "--seed", SEED, "--device", "cpu"]
    assert main([*map(str, draw), "--out", str(out)]) == 0
    pipe = OneStepPipeline.from_pipe(layouts.make(case))
    pipe.load_one_step_lora(file)
    ours = np.asarray(pipe(PROMPT, seed=SEED).images[0]).astype(int)
    assert np.abs(np.asarray(Image.open(out)).astype(int) - ours).max() <= 1
