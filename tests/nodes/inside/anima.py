"""anima.py FOLDER WORK: a tiny Anima's folder in ComfyUI (support/comfy_both_hosts.py): its latents, its text beside
what ComfyUI itself makes of it, its attention beside that of ComfyUI's own op, whose encoder is refused, and
a picture whose first part the base draws."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import folder_paths
import torch
from comfy_both_hosts import WORK, answer, facts, given, load, measured, told, trained
from comfy_drawn import diverse
from safetensors.torch import load_file

from nodes import ControlNetApplyAdvanced
from onestep.core.errors import OneStepError
from onestep.core.guidance import MODES, Steering
from onestep.core.recipe import Recipe
from onestep.nodes.adapt import adapted
from onestep.nodes.control import LoadControlAdapter
from onestep.nodes.denoiser import conditionings
from onestep.nodes.guidance_adapter import guided_model
from onestep.nodes.refusals import refuse_encoder
from onestep.nodes.sample import OneStepSample
from onestep.nodes.steer import steered_model

folder_paths.add_model_folder_path("controlnet", str(WORK))


def pictures(host):
    """Pictures, their latents, and what these are decoded to."""
    made = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    latents = host.latents_of(made)
    return {"pictures": made, "latents": latents, "decoded": host.decode(latents)}


def by_comfyui(model, clip, host):
    """x0 by core's own way from a CONDITIONING: its adapter at each step, and its op for the rotary embedding."""
    x, sigma = given["x"].unsqueeze(2), given["sigma"].float()
    answers, texts = [], []
    for row, (text, told_beside) in enumerate(conditionings(clip, told["prompts"])):
        conds = model.model.extra_conds(
            cross_attn=text, device=x.device, noise=x, prompt_type="positive", **told_beside
        )
        texts.append(conds["c_crossattn"].cond)
        answers.append(
            model.model.apply_model(
                x[row : row + 1], sigma[row : row + 1], c_crossattn=texts[-1], transformer_options={}
            )
        )
    return {"core": torch.cat(answers).squeeze(2), "core text": torch.cat(texts)}


def made_before(model, conditioning):
    """A text as the network itself makes it, filled up by zeros, without the ids that it was made from."""
    (text, more), dtype = conditioning[0], model.model.get_dtype_inference()
    weights = more["t5xxl_weights"][None, :, None].to(dtype)
    made = model.model.diffusion_model.preprocess_text_embeds(text.to(dtype), more["t5xxl_ids"][None], weights)
    return [[made, {}]]


def steered(model, clip):
    """One step of the base, steered by each mode's own numbers, from a seed's noise; and unsteered."""
    positive, negative, empty = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in told["steered"])
    recipe = Recipe.from_json(told["recipe"])
    start = {"samples": torch.zeros(1, 16, 1, 4, 4)}
    models = {mode: steered_model(model, negative, Steering(mode), empty=empty) for mode in MODES} | {"none": model}
    models["by text made before"] = steered_model(model, made_before(model, negative), Steering("vsf"))
    net = LoadControlAdapter.execute("control.safetensors").args[0]
    picture = load_file(WORK / "picture.safetensors")["picture"].movedim(1, -1).expand(-1, -1, -1, 3)
    controlled, _ = ControlNetApplyAdvanced().apply_controlnet(positive, positive, net, picture, 1.0, 0.0, 1.0)
    models["guided"] = guided_model(model, WORK / "guidance.safetensors", 4.0)
    return {
        f"steered {mode}": model.model.process_latent_in(
            OneStepSample.execute(one, words, start, recipe, 5).args[0]["samples"]
        ).squeeze(2)
        for mode, one, words in (
            *((mode, one, positive) for mode, one in models.items()),
            ("by control", model, controlled),
        )
    }


def refusals(model, clip):
    """What is said of a CLIP that gives no token ids."""

    class Plain:
        tokenize = clip.tokenize

        def encode_from_tokens_scheduled(self, tokens):
            return [[text, {"pooled_output": None}] for text, _ in clip.encode_from_tokens_scheduled(tokens)]

    try:
        refuse_encoder(Plain(), model.model)
    except OneStepError as error:
        return str(error)


with torch.inference_mode():
    model, clip, vae = load()
    with adapted(model, clip, vae) as host:
        out = pictures(host)
        with torch.inference_mode():
            out |= by_comfyui(model, clip, host)
        more, again = measured(host)
        with torch.no_grad():
            cond = host.encode(told["prompts"], (32, 32))
            out["base"] = host.denoiser(given["x"], given["sigma"], cond)
        report = facts(host, again) | {"refused": refusals(model, clip)}
    out |= steered(model, clip) | {"diverse": diverse(model, clip, *told["diverse"])}
    report["files"] = trained(model, clip, vae)
answer(out | more, report)
