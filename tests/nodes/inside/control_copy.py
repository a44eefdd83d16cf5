"""control_copy.py UNET WORK: a ControlNet made by us, as a CONTROL_NET, as a side, and by core's own loader."""

import json
import sys
from pathlib import Path

import comfy.controlnet
import comfy.model_detection
import comfy.ops
import comfy.sample
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from nodes import ControlNetApplyAdvanced
from onestep.core.adapter_file import save_adapter
from onestep.core.adapter_module import Call
from onestep.core.cond import Cond
from onestep.core.control_copy import new_copy
from onestep.core.families import bind_comfy, unet_parts
from onestep.core.role_map import RoleMap
from onestep.core.roles import Roles
from onestep.nodes.control import LoadControlAdapter
from onestep.nodes.denoiser import port_of
from onestep.nodes.tiny_models.model import load_tiny

UNET, WORK = (Path(argument) for argument in sys.argv[1:])
folder_paths.add_model_folder_path("controlnet", str(WORK))
told = {}


def stirred(network, config, cell):
    targets = {target.name: target for target in bind_comfy("unet", network, config)}
    copy, draw = new_copy(targets, unet_parts(network), ("canny", 1), cell, {}), torch.Generator().manual_seed(0)
    for name, value in copy.named_parameters():
        if name.startswith(("controlnet_down", "controlnet_mid")):
            value.copy_(0.1 * torch.randn(value.shape, generator=draw))
    return copy, targets


def fill(network):
    """Random weights that keep activations' scale; none is 0."""
    made = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        spread = 0.1 if value.ndim < 2 else value[0].numel() ** -0.5
        value.copy_(torch.randn(value.shape, generator=made) * spread + float(value.ndim < 2 and "weight" in name))


def draw(model, positive, negative, steps, cfg):
    latent = torch.zeros(2, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 3)
    return comfy.sample.sample(model, noise, steps, cfg, "euler", "simple", positive, negative, latent, seed=3).clone()


with torch.inference_mode():
    model, clip, _ = load_tiny(UNET)
    network = model.model.diffusion_model
    copy, targets = stirred(network, model.model.model_config.unet_config, 4)
    save_adapter(WORK / "copy.safetensors", copy, "unet")
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red dragon", ""))
    control = (torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1)) > 0.8).float()
    net = LoadControlAdapter.execute("copy.safetensors").args[0]
    image = control.movedim(1, -1).expand(-1, -1, -1, 3)
    controlled = ControlNetApplyAdvanced().apply_controlnet(positive, negative, net, image, 0.7, 0.0, 1.0)
    for steps, cfg in ((1, 1.0), (2, 3.0)):
        plain, found = draw(model, positive, negative, steps, cfg), draw(model, *controlled, steps, cfg)
        roles, call = Roles(list(targets.values()), port_of(network, "unet")), Call(None, None, None)
        roles.add_module("control", copy)
        call.inputs = {"control": control, "strength": 0.7}

        def note(module, args, more, call=call):
            call.time, call.cond = args[1].float(), Cond(more["context"])

        handle = network.register_forward_pre_hook(note, with_kwargs=True)
        with roles.installed(), roles.serving(RoleMap((("control", None),), call=call)):
            side = draw(model, positive, negative, steps, cfg)
        handle.remove()
        told[f"side {steps}"] = float((side - found).abs().max())
        told[f"effect {steps}"] = float((plain - found).abs().max())
        told[f"after {steps}"] = torch.equal(draw(model, positive, negative, steps, cfg), plain)

    # a U-Net of SD1.5's width, whose ControlNets core's loader knows
    config = {
        **{"image_size": 32, "in_channels": 4, "model_channels": 320, "channel_mult": [1, 2]},
        **{"num_res_blocks": [1, 1], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1]},
        **{"transformer_depth_middle": 1, "context_dim": 64, "use_linear_in_transformer": False},
        **{"use_spatial_transformer": True, "legacy": False, "num_heads": 8, "num_head_channels": -1},
    }
    wide = UNetModel(**config, out_channels=4, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    fill(wide)
    copy, _ = stirred(wide, config, 8)
    save_adapter(WORK / "wide.safetensors", copy, "unet")
    # it guesses the U-Net among the published ones: this one is told
    comfy.model_detection.unet_config_from_diffusers_unet = lambda *_: {**config, "out_channels": 4}
    core = comfy.controlnet.load_controlnet_state_dict(comfy.utils.load_torch_file(str(WORK / "wide.safetensors")))
    x, time, text = torch.randn(2, 4, 8, 8), torch.tensor([600.0, 100.0]), torch.randn(2, 7, 64)
    hint = (torch.rand(2, 1, 64, 64) > 0.8).float()
    theirs = core.control_model.float()(x, hint.expand(-1, 3, -1, -1), time, text)
    ours = copy(x, time, text, hint)
    pairs = list(zip(ours, [*theirs["output"], *theirs["middle"]], strict=True))
    told["core"] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

print(json.dumps(told))
