"""z_image.py FOLDER WORK: a tiny Z-Image in ComfyUI (support/comfy_both_hosts.py), for texts of two lengths; features,
x0 steered away from a negative, a picture whose first part the base draws, and what is said of variants."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from comfy_both_hosts import COND, answer, facts, given, load, measured, students, told, trained
from comfy_steering import x0_of

from onestep.core.errors import OneStepError
from onestep.core.features import Features
from onestep.core.guidance import Steering
from onestep.core.lora_file import load_lora
from onestep.core.recipe import Recipe
from onestep.nodes.adapt import adapted
from onestep.nodes.diversity import OneStepDiversitySigmas
from onestep.nodes.sample import OneStepSampler
from onestep.nodes.steer import steered_model
from onestep.nodes.steer_text import encode_negative


def features(host):
    """What a discriminator's head would see of the student."""
    roles = host.denoiser.roles
    found = Features(roles.targets, host.blocks, 2, roles.active_here)
    with students(host), torch.no_grad(), roles.use("student"), found.kept(given["x"]) as values:
        host.denoiser(given["x"], given["sigma"], COND)
    return {f"feature/{name}": value for name, value in zip(found.names, values, strict=True)}


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


def refused(model, mark):
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


with torch.inference_mode():
    model, clip, vae = load()
    with adapted(model, clip, vae) as host:
        out, again = measured(host)
        out |= features(host)
        report = facts(host, again)
    for number, (mode, *texts) in enumerate(told["steered"]):
        out[f"steered/{number}"] = steered(model, clip, mode, *texts)
    out["diverse"] = model.model.process_latent_in(diverse(model, clip, *told["diverse"]))
    report["files"] = trained(model, clip, vae)
with torch.inference_mode(False):
    report["refused"] = {mark: refused(model, mark) for mark in ("siglip_embedder", "dec_net")}
answer(out, report)
