"""tiny_forward.py FOLDER INPUTS OUTPUTS: what ComfyUI's objects make of a tiny folder, for the test to compare."""

import sys
from pathlib import Path

import comfy.model_management as management
import torch
from safetensors.torch import load_file, save_file

from onestep.nodes.tiny_models.model import load_tiny

folder, given, out = Path(sys.argv[1]), load_file(sys.argv[2]), {}
prompts = ["a red dragon", "Zürich, (blue) wall!", ""]


def network(patcher, text, pooled):
    """The raw prediction of the diffusion model at the given times."""
    management.load_models_gpu([patcher])
    rows = len(given["x"])
    options = {} if pooled is None else {"y": pooled.expand(rows, -1)}
    return patcher.model.diffusion_model(given["x"], given["time"], context=text.expand(rows, -1, -1), **options)


with torch.inference_mode():
    model, clip, vae = load_tiny(folder)
    flow = "tiny-flow" in folder.name
    for index, prompt in enumerate(prompts):
        tokens = clip.tokenize(prompt)
        (text, extra) = clip.encode_from_tokens_scheduled(tokens)[0]
        out[f"ids{index}"] = torch.tensor([token for token, _ in tokens["l"][0]])
        out[f"text{index}"], out[f"pooled{index}"] = text, extra["pooled_output"]
    out["prediction"] = network(model, out["text0"], out["pooled0"] if flow else None)
    out["decoded"] = vae.decode(given["latents"])
    out["encoded"] = vae.encode(given["pixels"])
    out["model_latents"] = model.model.process_latent_in(out["encoded"])
    preview = torch.tensor(model.model.latent_format.latent_rgb_factors)
    flat = model.model.process_latent_in(vae.encode(given["flat"]))[:, :, 2:-2, 2:-2].mean((2, 3))
    out["preview"] = flat @ preview + torch.tensor(model.model.latent_format.latent_rgb_factors_bias)
    out["sigmas"] = model.get_model_object("model_sampling").sigmas

with torch.inference_mode(False):
    copy = model.clone(force_deepcopy=True)
    out["copy"] = network(copy, out["text0"].clone(), out["pooled0"].clone() if flow else None)
    weights = list(copy.model.diffusion_model.parameters())
    assert weights and not any(weight.is_inference() for weight in weights)
    shared = {weight.data_ptr() for weight in weights} & {
        w.data_ptr() for w in model.model.diffusion_model.parameters()
    }
    assert not shared, "the deep copy shares weights with the plugged model"
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in out.items()}, sys.argv[3])
