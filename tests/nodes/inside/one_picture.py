"""one_picture.py FOLDER CASE...: what ComfyUI's own nodes draw with a LoRA by the values told, and what ours draw.

Reads CASE.json (ComfyUI's unet_config, the nodes' values), CASE.weights / .cond.safetensors and the LoRAs in FOLDER;
writes CASE.out.safetensors, latents in the model's own scale.
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import comfy.model_patcher
import comfy.supported_models as supported
import comfy_extras.nodes_custom_sampler as custom
import folder_paths
import torch
from comfy_networks import as_published, fill
from safetensors.torch import load_file, save_file

from nodes import KSampler, KSamplerAdvanced, LoraLoaderModelOnly
from onestep.nodes.load_lora import LoadOneStepLoRA
from onestep.nodes.sample import OneStepSample

folder, cases = Path(sys.argv[1]), sys.argv[2:]
folder_paths.add_model_folder_path("loras", str(folder))
KINDS = ("SD15", "SDXL", "SD3", "Flux", "ZImage", "Flux2", "Anima", "QwenImage", "Chroma", "Lumina2", "WAN21_T2V")
KINDS += ("Krea2",)
CLASSES = {name: getattr(supported, name) for name in KINDS}


def build(kind, config):
    """ComfyUI's model of this kind at a width that it would not recognise by itself."""
    settings = type("Small", (CLASSES[kind],), {"unet_extra_config": {}})({**config})
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({}, "", device="cpu")
    as_published(model.diffusion_model)
    return model.float()


def by_ksampler(model, cond, empty, told, seed):
    widgets, seeds = dict(told["simple"]), {"seed": seed}
    node = KSampler()
    if "start_at_step" in widgets:
        node, seeds = KSamplerAdvanced(), {"noise_seed": seed}
    return node.sample(model=model, positive=cond, negative=cond, latent_image=empty, **seeds, **widgets)[0]


def by_sigmas(model, cond, empty, told, seed):
    widgets = told["general"]
    return custom.SamplerCustomAdvanced.execute(
        noise=custom.RandomNoise.execute(seed)[0],
        guider=custom.BasicGuider.execute(model, cond)[0],
        sampler=custom.KSamplerSelect.execute(widgets["sampler_name"])[0],
        sigmas=custom.ManualSigmas.execute(widgets["sigmas"])[0],
        latent_image=empty,
    )[0]


def run(case):
    told = json.loads((folder / f"{case}.json").read_text())
    weights, given = (load_file(folder / f"{case}.{part}.safetensors") for part in ("weights", "cond"))
    model = build(told["kind"], told["unet_config"])
    assert fill(told["family"], model, weights, told["unet_config"]) == []
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    more = {"width": told["side"], "height": told["side"]}
    # Chroma's network reads one too, which was never trained: diffusers' is always 0
    more |= {} if told["family"] == "chroma" else {"guidance": 3.5}
    pooled = {"pooled_output": given["pooled"]} if "pooled" in given else {}
    cond, seed = [[given["text"], {**more, **pooled}]], told["seed"]
    empty = {"samples": torch.zeros(told["shape"])}
    out = {}
    for lora, values in told["loras"].items():
        core = LoraLoaderModelOnly().load_lora_model_only(patcher, lora, 1.0)[0]
        if values["simple"]:
            out[f"{lora}|KSampler"] = by_ksampler(core, cond, empty, values, seed)
            out[f"{lora}|without"] = by_ksampler(patcher, cond, empty, values, seed)
        if values["general"]:
            out[f"{lora}|ManualSigmas"] = by_sigmas(core, cond, empty, values, seed)
        loaded = LoadOneStepLoRA.execute(patcher, lora, "from the file").args
        out[f"{lora}|One-Step Sample"] = OneStepSample.execute(loaded[0], cond, empty, loaded[1], seed).args[0]
    latents = {name: model.process_latent_in(latent["samples"]).contiguous() for name, latent in out.items()}
    save_file(latents, folder / f"{case}.out.safetensors")


with torch.inference_mode():
    for case in cases:
        run(case)
