"""wan.py FOLDER WORK: a tiny Wan's folder in ComfyUI (support/comfy_both_hosts.py): its latents, its answers beside
ComfyUI's own, steered and guided pictures; and networks of Wan's kinds as ComfyUI's own loader detects them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import comfy.sd
import comfy_extras.nodes_custom_sampler as custom
import torch
from comfy_both_hosts import WORK, answer, facts, given, load, measured, seen_by_head, told, trained
from comfy_controlled import controlled, of_a_video
from safetensors.torch import save_file

from onestep.core.errors import OneStepError
from onestep.core.guidance import MODES, Steering
from onestep.core.ksampler import core_nodes
from onestep.core.recipe import Recipe
from onestep.core.schedule import FlowSchedule
from onestep.nodes.adapt import adapted
from onestep.nodes.denoiser import conditionings
from onestep.nodes.guidance_adapter import guided_model
from onestep.nodes.sample import OneStepSample
from onestep.nodes.steer import steered_model


def pictures(host):
    """Pictures, their latents, and what these are decoded to."""
    made = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    latents = host.latents_of(made)
    return {"pictures": made, "latents": latents, "decoded": host.decode(latents)}


def by_comfyui(model, clip):
    """x0 by core's own way from a CONDITIONING."""
    x, sigma, answers = given["x"].unsqueeze(2), given["sigma"].float(), []
    for row, (text, beside) in enumerate(conditionings(clip, told["prompts"])):
        conds = model.model.extra_conds(cross_attn=text, device=x.device, noise=x, prompt_type="positive", **beside)
        more = {"c_crossattn": conds["c_crossattn"].cond, "transformer_options": {}}
        answers.append(model.model.apply_model(x[row : row + 1], sigma[row : row + 1], **more))
    return {"core": torch.cat(answers).squeeze(2)}


def steered(model, clip):
    """One step of the base, steered by each mode's own numbers, from a seed's noise; and unsteered."""
    positive, negative, empty = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in told["steered"])
    recipe = Recipe.from_json(told["recipe"])
    start = {"samples": torch.zeros(1, 16, 1, 4, 4)}
    models = {mode: steered_model(model, negative, Steering(mode), empty=empty) for mode in MODES} | {"none": model}
    models["guided"] = guided_model(model, WORK / "guidance.safetensors", 4.0)
    return {
        f"steered {mode}": model.model.process_latent_in(
            OneStepSample.execute(one, positive, start, recipe, 5).args[0]["samples"]
        ).squeeze(2)
        for mode, one in models.items()
    }


def by_experts(model, clip):
    """Four steps at once; the first two and then the others, by One-Step Sample and by core's nodes; and what is said
    of latents that another pair has left."""
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(told["steered"][0]))
    whole, high, low = (Recipe.from_json(told[name]) for name in ("whole", "high", "low"))
    start = {"samples": torch.zeros(1, 16, 1, 4, 4)}

    def ours(latent, recipe):
        return OneStepSample.execute(model, positive, latent, recipe, 5).args[0]

    def cores(latent, recipe, noise):
        told = core_nodes(recipe, FlowSchedule(3.0)).general
        guider = custom.BasicGuider.execute(model, positive)[0]
        sampler = custom.KSamplerSelect.execute(told.sampler_name)[0]
        sigmas = custom.ManualSigmas.execute(told.sigmas)[0]
        return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent)[0]

    first = ours(start, high)
    begun = cores(start, high, custom.RandomNoise.execute(5)[0])
    try:
        said = ours(first, whole)
    except OneStepError as error:
        said = str(error)
    drawn = {"whole": ours(start, whole), "experts": ours(first, low), "left": first}
    drawn |= {"core left": begun, "core experts": cores(begun, low, custom.DisableNoise.execute()[0])}
    return {f"drawn {way}": latent["samples"].contiguous() for way, latent in drawn.items()}, said


def weights(channels=16, inputs=16, text=4096, dim=128, more=()):
    """Of a network of one block in Wan's names, the least that ComfyUI's own loader takes for one."""
    shapes = {
        **{
            "patch_embedding.weight": (dim, inputs, 1, 2, 2),
            "patch_embedding.bias": (dim,),
            "head.modulation": (1, 2, dim),
        },
        **{"head.head.weight": (4 * channels, dim), "head.head.bias": (4 * channels,)},
        **{"blocks.0.modulation": (1, 6, dim), "blocks.0.norm3.weight": (dim,), "blocks.0.norm3.bias": (dim,)},
        **dict(more),
    }
    layers = {"text_embedding.0": text, "text_embedding.2": dim, "time_embedding.0": 256, "time_embedding.2": dim}
    layers |= {f"blocks.0.{kind}_attn.{letter}": dim for kind in ("self", "cross") for letter in "qkvo"}
    layers |= {"blocks.0.ffn.0": dim, "blocks.0.ffn.2": 2 * dim, "time_projection.1": dim}
    outputs = {"blocks.0.ffn.0": 2 * dim, "time_projection.1": 6 * dim}
    for name, width in layers.items():
        shapes |= {f"{name}.weight": (outputs.get(name, dim), width), f"{name}.bias": (outputs.get(name, dim),)}
    norms = [f"blocks.0.{kind}_attn.norm_{letter}.weight" for kind in ("self", "cross") for letter in "qk"]
    return {name: torch.zeros(shape) for name, shape in (shapes | dict.fromkeys(norms, (dim,))).items()}


KINDS = {
    "2.1": {},
    "2.2 5B": {"channels": 48, "inputs": 48},
    "image to video": {"inputs": 36},
    "VACE": {"more": {"vace_patch_embedding.weight": (128, 96, 1, 2, 2), "vace_blocks.0.after_proj.bias": (128,)}},
}


def detected():
    """What is made of a network of each kind that ComfyUI's own loader detects."""
    found = {}
    for kind, how in KINDS.items():
        try:
            save_file(weights(**how), WORK / f"{kind}.safetensors")
            model = comfy.sd.load_diffusion_model(str(WORK / f"{kind}.safetensors"))
            with adapted(model, None, None) as host:
                said = [host.family, len(host.denoiser.roles.targets), list(host.latent_shape((64, 32)))]
        except (OneStepError, RuntimeError) as error:
            said = str(error)
        found[kind] = said
    return found


with torch.inference_mode():
    model, clip, vae = load()
    with adapted(model, clip, vae) as host:
        out = pictures(host)
        with torch.inference_mode():
            out |= by_comfyui(model, clip)
        more, again = measured(host)
        more |= seen_by_head(host)
        with torch.no_grad():
            cond = host.encode(told["prompts"], (32, 32))
            out["base"] = host.denoiser(given["x"], given["sigma"], cond)
        report = facts(host, again)
    out |= steered(model, clip) | controlled(model, clip, told["steered"][0], torch.zeros(1, 16, 1, 4, 4))
    report["video"] = of_a_video(model, clip, told["steered"][0])
    drawn, report["of another pair"] = by_experts(model, clip)
    out |= drawn
    report["files"] = trained(model, clip, vae)
    report["detected"] = detected()
answer(out | more, report)
