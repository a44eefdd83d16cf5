"""control.py UNET FLOW WORK: a control adapter as a CONTROL_NET, against the same adapter as a side."""

import json
import logging
import sys
from pathlib import Path

import comfy.sample
import folder_paths
import torch
from comfy_extras.nodes_controlnet import ControlNetInpaintingAliMamaApply

from nodes import ControlNetApplyAdvanced
from onestep.core.adapter_file import save_adapter
from onestep.core.adapter_module import Call
from onestep.core.control import new_adapter
from onestep.core.controls import with_mask
from onestep.core.errors import OneStepError
from onestep.core.families import bind_comfy
from onestep.core.role_map import RoleMap
from onestep.core.roles import Roles
from onestep.nodes.control import KINDS, LoadControlAdapter
from onestep.nodes.places import files_of
from onestep.nodes.tiny_models.model import load_tiny

UNET, FLOW, WORK = (Path(argument) for argument in sys.argv[1:])
folder_paths.add_model_folder_path("controlnet", str(WORK))
told, lines = {}, []
logging.getLogger().addHandler(
    type("Kept", (logging.Handler,), {"emit": lambda self, r: lines.append(r.getMessage())})()
)


def draw(model, positive, negative, steps, cfg):
    latent = torch.zeros(2, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 3)
    return comfy.sample.sample(model, noise, steps, cfg, "euler", "simple", positive, negative, latent, seed=3).clone()


def apart(a, b):
    return float((a - b).abs().max())


def refused(action):
    try:
        action()
    except OneStepError as error:
        return str(error)
    return "accepted"


with torch.inference_mode():
    model, clip, _ = load_tiny(UNET)
    targets = {t.name: t for t in bind_comfy("unet", model.model.diffusion_model, model.model.model_config.unet_config)}
    side = new_adapter("unet", targets, ("canny", 1), (32, 32), (4, 8, 8), width=16)
    save_adapter(WORK / "new.safetensors", side, "unet")
    generator = torch.Generator().manual_seed(0)
    for leave in side.leave:
        leave.weight.copy_(0.2 * torch.randn(leave.weight.shape, generator=generator))
    save_adapter(WORK / "stirred.safetensors", side, "unet")
    image = torch.rand(2, 32, 32, 1, generator=generator).expand(-1, -1, -1, 3)
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red dragon", ""))

    def controlled(name, strength=1.0, picture=image, span=(0.0, 1.0), over=None):
        net = LoadControlAdapter.execute(name).args[0]
        conds = over or (positive, negative)
        return ControlNetApplyAdvanced().apply_controlnet(*conds, net, picture, strength, *span)

    grey = image[..., :1].movedim(-1, 1)

    def by_adapter(steps, cfg, strength=1.0, adapter=side, control=grey):
        """The same adapter hung on the layers themselves, for both of guidance's halves."""
        roles = Roles(list(targets.values()))
        roles.add_module("control", adapter)
        call = Call(None, None, {"control": control, "strength": strength})
        with roles.installed(), roles.serving(RoleMap((("control", None),), call=call)):
            return draw(model, positive, negative, steps, cfg)

    told["names"] = files_of(*KINDS)
    for steps, cfg in ((1, 1.0), (2, 3.0)):
        plain = draw(model, positive, negative, steps, cfg)
        told[f"new {steps}"] = torch.equal(draw(model, *controlled("new.safetensors"), steps, cfg), plain)
        found = draw(model, *controlled("stirred.safetensors", 0.7), steps, cfg)
        told[f"side {steps}"] = apart(found, by_adapter(steps, cfg, 0.7))
        told[f"effect {steps}"] = apart(found, plain)
        told[f"after {steps}"] = torch.equal(draw(model, positive, negative, steps, cfg), plain)
    early = draw(model, *controlled("stirred.safetensors", span=(0.0, 0.4)), 2, 3.0)
    told["range"] = apart(early, plain), apart(early, draw(model, *controlled("stirred.safetensors"), 2, 3.0))
    both = controlled("stirred.safetensors", 0.3, over=controlled("stirred.safetensors", 0.4))
    told["two"] = apart(draw(model, *both, 2, 3.0), by_adapter(2, 3.0, 0.7))
    large = image.repeat_interleave(2, 1).repeat_interleave(2, 2)
    resized = draw(model, *controlled("stirred.safetensors", 0.7, large), 2, 3.0)
    told["resized"] = bool(resized.isfinite().all())
    told["log"] = [line for line in lines if "resized" in line]
    inpaint = new_adapter("unet", targets, ("mask", 4), (32, 32), (4, 8, 8), width=16, seed=1)
    inpaint.leave[0].weight.normal_(generator=generator)
    save_adapter(WORK / "inpaint.safetensors", inpaint, "unet")
    colours = torch.rand(2, 32, 32, 3, generator=generator)
    hole = torch.zeros(2, 32, 32)
    hole[:, 8:20, 4:30] = 1
    net = LoadControlAdapter.execute("inpaint.safetensors").args[0]
    conds = ControlNetInpaintingAliMamaApply.execute(positive, negative, net, None, colours, hole, 1.0, 0.0, 1.0).args
    found, control = draw(model, *conds, 2, 3.0), with_mask(colours.movedim(-1, 1), hole[:, None])
    told["mask"] = apart(found, by_adapter(2, 3.0, adapter=inpaint, control=control)), apart(found, plain)
    flow, flow_clip, _ = load_tiny(FLOW)
    conds = [flow_clip.encode_from_tokens_scheduled(flow_clip.tokenize(text)) for text in ("a red dragon", "")]
    told["flow"] = refused(lambda: draw(flow, *controlled("stirred.safetensors", over=conds), 1, 1.0))
    save_adapter(WORK / "sd3.safetensors", side, "sd3")
    told["sd3"] = refused(lambda: draw(flow, *controlled("sd3.safetensors", over=conds), 1, 1.0))
    told["missing"] = refused(lambda: LoadControlAdapter.execute("none.safetensors"))
    wide = new_adapter("unet", targets, ("canny", 1), (32, 32), (4, 8, 8), width=16)
    config = {**wide.config.__dict__, "places": [{**p.__dict__, "channels": 7} for p in wide.config.places]}
    save_adapter(WORK / "wide.safetensors", type(wide).from_config(**config), "unet")
    told["wide"] = refused(lambda: draw(model, *controlled("wide.safetensors"), 1, 1.0))

print(json.dumps(told))
