"""stored_refused.py CHECKPOINT KITCHEN: bases of other packs' loaders, and broken ones; what is said of each."""

import json
import sys

import comfy.sd
import torch
from safetensors.torch import load_file, save_file

from onestep.core.errors import OneStepError
from onestep.nodes.adapt import adapted

PLAIN, KITCHEN = sys.argv[1:3]


class GGMLTensor(torch.Tensor):
    """As a GGUF loader keeps a weight: raw bytes, and what they are."""

    tensor_shape = torch.Size((384, 128))


class PackedLinear(torch.nn.Module):
    """As a 4-bit loader keeps a layer: its numbers under names of their own."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.qweight = torch.nn.Parameter(torch.zeros(384, 64, dtype=torch.int8), requires_grad=False)


def load(path):
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(path, output_clip=False)[0]


def said(model):
    try:
        with adapted(model, None, None):
            return ""
    except OneStepError as error:
        return str(error)


def packed(change):
    model = load(PLAIN)
    change(model.model.diffusion_model.double_blocks[0].img_attn)
    return said(model)


def gguf(part):
    raw = torch.zeros(100, dtype=torch.uint8).as_subclass(GGMLTensor)
    part.qkv.weight = torch.nn.Parameter(raw, requires_grad=False)


def nf4(part):
    part.qkv.weight = torch.nn.Parameter(torch.zeros(384 * 64, 1, dtype=torch.uint8), requires_grad=False)


def svdquant(part):
    part.qkv = PackedLinear(part.qkv)


def changed(name, change):
    state = load_file(KITCHEN)
    key = next(key for key in sorted(state) if key.endswith("weight_scale"))
    change(state, key)
    path = KITCHEN.replace(".safetensors", f"_{name}.safetensors")
    save_file(state, path)
    return said(load(path))


def nan(state, key):
    state[key] = torch.full_like(state[key], float("nan"))


print(
    json.dumps(
        {
            **{"gguf": packed(gguf), "nf4": packed(nf4), "svdquant": packed(svdquant)},
            **{"nan": changed("nan", nan), "whole": said(load(KITCHEN))},
        }
    )
)
