"""What a tiny model draws in ComfyUI for support/both_hosts.py: away from negatives, its first part by the base."""

import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from comfy_both_hosts import given, told
from comfy_steering import x0_of

from onestep.core.guidance import Steering
from onestep.core.lora_file import load_lora
from onestep.core.recipe import Recipe
from onestep.nodes.denoiser import framed, unframed
from onestep.nodes.diversity import OneStepDiversitySigmas
from onestep.nodes.sample import OneStepSampler
from onestep.nodes.steer import steered_model
from onestep.nodes.steer_text import encode_negative


def steered(model, clip, mode, prompt, negative):
    positive, away, empty = (encode_negative(clip, text) for text in (prompt, negative, ""))
    clone = steered_model(model, away, Steering(mode), empty=empty)
    noise = framed(model.model, given["x"][:1])
    return unframed(model.model, x0_of(clone, positive, shares=(told["share"],), noise=noise)[0])


def diverse(model, clip, path, prompt, seed, steps, cfg, negative):
    """x0 of two SamplerCustom, of the base and of the few-step model, at the levels of Diversity Sigmas."""
    recipe = Recipe.from_json(load_lora(path).recipe)
    few = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(path), 1.0, 0.0)[0]
    first, rest = OneStepDiversitySigmas.execute(model, few, recipe, steps, "simple", 0.0).args
    texts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, negative)]
    noise = torch.randn(given["x"][:1].shape, generator=torch.Generator().manual_seed(seed))
    noise = framed(model.model, noise)
    euler, ours = comfy.samplers.sampler_object("euler"), OneStepSampler.execute(recipe).args[0]
    half = comfy.sample.sample_custom(model, noise, cfg, euler, first, *texts, torch.zeros_like(noise))
    latents = comfy.sample.sample_custom(few, torch.zeros_like(noise), 1.0, ours, rest, *texts, half)
    return unframed(model.model, model.model.process_latent_in(latents))


def drawn(model, clip):
    """By their names in out.safetensors."""
    found = {f"steered/{n}": steered(model, clip, mode, *texts) for n, (mode, *texts) in enumerate(told["steered"])}
    return found | {"diverse": diverse(model, clip, *told["diverse"])}
