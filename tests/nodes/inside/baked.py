"""baked.py FOLDER LORA: a LoRA and a sampling patch on the plugged MODEL are part of the teacher."""

import json
import sys
from pathlib import Path

import comfy.sample
import comfy.sd
import comfy.utils
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3

from onestep.core.sampling import teacher_sample
from onestep.nodes.adapt import adapted
from onestep.nodes.tiny_models.model import load_tiny

with torch.inference_mode():
    model, clip, vae = load_tiny(Path(sys.argv[1]))
    stacked, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(sys.argv[2]), 0.7, 0.0)
    if "flow" in sys.argv[1]:
        stacked = ModelSamplingSD3().patch(stacked, 6.0)[0]
    positive = clip.encode_from_tokens_scheduled(clip.tokenize("a red dragon"))
    latent = torch.zeros(1, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 3)

    def sampled(patcher):
        drawn = comfy.sample.sample(patcher, noise, 4, 1.0, "euler", "simple", positive, positive, latent, seed=3)
        return patcher.model.process_latent_in(drawn.cpu())

    plain, expected = sampled(model), sampled(stacked)
    with adapted(stacked, clip, vae) as host:
        cond = host.encode(["a red dragon"], (32, 32))
        with host.training(), torch.no_grad():
            ours = teacher_sample(host.denoiser, cond, None, noise.clone(), 4, 1.0)
    again = sampled(stacked)
    scale = float(expected.std())
    print(
        json.dumps(
            {
                "effect": float((expected - plain).abs().max()) / scale,
                "apart": float((ours - expected).abs().max()) / scale,
                "unchanged": bool(torch.equal(again, expected)),
            }
        )
    )
