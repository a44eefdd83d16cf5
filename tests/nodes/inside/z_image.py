"""z_image.py FOLDER WORK: a tiny Z-Image in ComfyUI. WORK/in.safetensors: inputs and adapters, for texts of two
lengths; WORK/out.safetensors: its texts, D and every gradient, checkpointed or not, x0 steered away from a negative, a
picture whose first part the base draws. Then a short run of each method."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from comfy_steering import x0_of
from safetensors.torch import load_file, save_file

from onestep.core.checkpoint import checkpoint_blocks, clone_inputs
from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.features import Features
from onestep.core.guidance import Steering
from onestep.core.lora_file import load_lora
from onestep.core.recipe import Recipe
from onestep.core.recomputed import GRADES, recomputed
from onestep.nodes.adapt import adapted
from onestep.nodes.diversity import OneStepDiversitySigmas
from onestep.nodes.sample import OneStepSampler
from onestep.nodes.steer import steered_model
from onestep.nodes.steer_text import encode_negative
from onestep.nodes.tiny_models.model import load_tiny
from onestep.training.distil import distil
from onestep.training.presets import preset

FOLDER, WORK = Path(sys.argv[1]), Path(sys.argv[2])
told = json.loads((WORK / "told.json").read_text())
given = load_file(WORK / "in.safetensors")


def gradients(host, grade):
    roles = host.denoiser.roles
    with roles.use("student"), clone_inputs(host.in_place), checkpoint_blocks(recomputed(host.blocks, grade), roles):
        x0 = host.denoiser(given["x"], given["sigma"], Cond(given["text"], mask=given["mask"]))
        found = torch.autograd.grad((given["weight"] * x0).sum(), roles.parameters("student"))
    return x0.detach(), found


def measured(host):
    cond = host.encode(told["prompts"], (32, 32))
    out = {"text": cond.text, "mask": cond.mask}
    roles = host.denoiser.roles
    with host.training():
        names = sorted(roles.targets)
        roles.load("student", {name: (given[f"A/{name}"], given[f"B/{name}"]) for name in names})
        roles.install()
        (out["x0"], plain), *others = (gradients(host, grade) for grade in GRADES)
        again = all(torch.equal(a, b) for _, found in others for a, b in zip(plain, found, strict=True))
        with torch.no_grad(), roles.rows([("teacher", 1), ("student", 2)]):
            out["mixed"] = host.denoiser(given["x"], given["sigma"], Cond(given["text"], mask=given["mask"]))
        features = Features(roles.targets, host.blocks, 2, roles.active_here)
        with torch.no_grad(), roles.use("student"), features.kept(given["x"]) as found:
            host.denoiser(given["x"], given["sigma"], Cond(given["text"], mask=given["mask"]))
        out |= {f"feature/{name}": value for name, value in zip(features.names, found, strict=True)}
        out |= dict(zip([f"{kind}/{name}" for name in names for kind in "AB"], plain, strict=True))
        roles.drop("student")
    return out, again


def steered(model, clip, mode, prompt, negative):
    positive, away, empty = (encode_negative(clip, text) for text in (prompt, negative, ""))
    clone = steered_model(model, away, Steering(mode), empty=empty)
    return x0_of(clone, positive, shares=(told["share"],), noise=given["x"][:1])[0]


def diverse(model, clip, path, prompt, seed, steps, cfg):
    """Two SamplerCustom, of the base and of the few-step model, at the levels of Diversity Sigmas."""
    recipe = Recipe.from_json(load_lora(path).recipe)
    few = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(path), 1.0, 0.0)[0]
    first, rest = OneStepDiversitySigmas.execute(model, few, recipe, steps, "simple", 0.0).args
    texts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")]
    noise = torch.randn(given["x"][:1].shape, generator=torch.Generator().manual_seed(seed))
    euler, ours = comfy.samplers.sampler_object("euler"), OneStepSampler.execute(recipe).args[0]
    half = comfy.sample.sample_custom(model, noise, cfg, euler, first, *texts, torch.zeros_like(noise))
    return comfy.sample.sample_custom(few, torch.zeros_like(noise), 1.0, ours, rest, *texts, half)


with torch.inference_mode():
    model, clip, vae = load_tiny(FOLDER)
    with adapted(model, clip, vae) as host:
        out, again = measured(host)
    for number, (mode, *texts) in enumerate(told["steered"]):
        out[f"steered/{number}"] = steered(model, clip, mode, *texts)
    out["diverse"] = model.model.process_latent_in(diverse(model, clip, *told["diverse"]))
    with adapted(model, clip, vae) as host:
        schedule = host.denoiser.schedule
        report = {"family": host.family, "shift": schedule.shift, "blocks": len(host.blocks), "again": again}
        report |= {"missing": [name for name, value in out.items() if not bool(value.any())], "files": {}}
    for method, settings in told["runs"].items():
        with adapted(model, clip, vae) as host:
            made = distil(
                host, told["prompts"], preset(None, **{"method": method, **settings}), WORK / f"comfy-{method}"
            )
            report["files"][method] = [made.path.name, made.check]


def refused(mark):
    """What is said of a MODEL with a module of this name, which only a variant has; nothing is copied for it."""
    network = model.model.diffusion_model
    setattr(network, mark, torch.nn.Linear(2, 2))
    try:
        with adapted(model, clip, vae):
            return ""
    except OneStepError as error:
        return str(error)
    finally:
        delattr(network, mark)


with torch.inference_mode(False):
    save_file({name: value.detach().clone().contiguous() for name, value in out.items()}, WORK / "out.safetensors")
report["refused"] = {mark: refused(mark) for mark in ("siglip_embedder", "dec_net")}
(WORK / "report.json").write_text(json.dumps(report))
