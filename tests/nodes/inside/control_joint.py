"""control_joint.py WORK: a control adapter as a CONTROL_NET of SD3 and Flux, against the same adapter as a side."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import comfy.ldm.common_dit
import folder_paths
import torch
from comfy_steering import condition, noise_of, shape_of, tiny, x0_of

from nodes import ControlNetApplyAdvanced
from onestep.core.adapter_file import save_adapter
from onestep.core.control import new_adapter
from onestep.core.families import bind_comfy
from onestep.core.roles import RoleMap, Roles
from onestep.core.side import Call
from onestep.nodes.control import LoadControlAdapter

WORK = Path(sys.argv[1])
folder_paths.add_model_folder_path("controlnet", str(WORK))
EMBED = {"sd3": "x_embedder", "flux": "img_in"}


def made(targets, family, shape):
    """An adapter away from its start; files of it and of a new one."""
    side = new_adapter(family, targets, ("canny", 1), (8 * shape[2], 8 * shape[1]), shape, width=16)
    save_adapter(WORK / f"{family}-new.safetensors", side, family)
    draw = torch.Generator().manual_seed(4)
    side.leave[0].weight.copy_(0.3 * torch.randn(side.leave[0].weight.shape, generator=draw))
    save_adapter(WORK / f"{family}.safetensors", side, family)
    return side


def doubled(args, extra):
    """A foreign replacement of the first block: its picture enters it twice as strong."""
    return extra["original_block"]({**args, "img": 2 * args["img"]})


def measured(family):
    model, positive, negative = tiny(family), condition(family, 7, 1), condition(family, 7, 2)
    network, shape = model.model.diffusion_model, shape_of(model)
    targets = {t.name: t for t in bind_comfy(family, network, model.model.model_config.unet_config)}
    side = made(targets, family, shape)
    image = torch.rand(1, 64, 64, 1, generator=torch.Generator().manual_seed(5)).expand(-1, -1, -1, 3)

    def controlled(name, strength=1.0, span=(0.0, 1.0), over=(positive, negative), picture=image):
        net = LoadControlAdapter.execute(f"{name}.safetensors").args[0]
        return ControlNetApplyAdvanced().apply_controlnet(*over, net, picture, strength, *span)

    def by_side(strength=1.0, cfg=1.0, given=model):
        roles = Roles(list(targets.values()))
        roles.add_side("control", side)
        call = Call(None, None, {"control": image[..., :1].movedim(-1, 1), "strength": strength})
        with roles.installed(), roles.serving(RoleMap((("control", None),), call=call)):
            return x0_of(given, positive, negative, cfg)[0]

    plain = x0_of(model, positive)[0]
    scale = float(plain.std())

    def apart(a, b):
        return float((a - b).abs().max()) / scale

    def hooked(noise, control, conds, kept=None, **told):
        """x0 where the features are added to the embedded picture by a hook of this test."""

        def add(module, given, out):
            x = given[0]
            if x.ndim == 3:  # Flux embeds tokens; those of a reference come last
                x = x[:, : control[0].numel() // 256].transpose(1, 2).unflatten(2, (control.shape[2] // 16, -1))
            else:
                x = torch.nn.functional.pixel_unshuffle(comfy.ldm.common_dit.pad_to_patch_size(x), 2)
            (feature,) = side(control, x)
            feature = feature.flatten(2).transpose(1, 2)
            out = out.clone()
            out[:, : feature.shape[1]] += feature
            return out

        handle = getattr(network, EMBED[family]).register_forward_hook(add)
        try:
            return x0_of(model, conds, noise=noise)[0]
        finally:
            handle.remove()

    full = x0_of(model, controlled(family)[0])[0]
    part = x0_of(model, controlled(family, 0.7)[0])[0]
    both = controlled(family, 0.3, over=controlled(family, 0.4))
    foreign = model.clone()
    foreign.set_model_patch_replace(doubled, "dit", "double_block", 0)
    odd = torch.randn(1, shape[0], 7, 5, generator=torch.Generator().manual_seed(6))
    small = image[:, :, :48].contiguous()
    found = {
        "effect": apart(full, plain),
        "side": max(apart(full, by_side()), apart(part, by_side(0.7))),
        "side, CFG": apart(x0_of(model, *controlled(family, 0.7), 3.0)[0], by_side(0.7, 3.0)),
        "two": apart(x0_of(model, both[0])[0], by_side(0.7)),
        "new": torch.equal(x0_of(model, controlled(f"{family}-new")[0])[0], plain),
        "late": apart(x0_of(model, controlled(family, 1.0, (0.0, 0.3))[0])[0], plain),
        "early": apart(x0_of(model, controlled(family, 1.0, (0.3, 1.0))[0])[0], plain),
        "replacement": apart(x0_of(foreign, controlled(family)[0])[0], full),
        "replaced": apart(x0_of(foreign, controlled(family)[0])[0], by_side(given=foreign)),
        "odd": apart(
            x0_of(model, controlled(family, picture=small)[0], noise=odd)[0],
            hooked(odd, small[..., :1].movedim(-1, 1), positive),
        ),
        "after": torch.equal(x0_of(model, positive)[0], plain),
    }
    if family == "flux":
        reference = noise_of(model, side=4)
        seen = [[positive[0][0], {**positive[0][1], "reference_latents": [reference]}]]
        by_hook = hooked(noise_of(model), image[..., :1].movedim(-1, 1), seen)
        told["reference"] = apart(x0_of(model, controlled(family, over=(seen, negative))[0])[0], by_hook)
    return found


told = {}
with torch.inference_mode():
    told |= {family: measured(family) for family in EMBED}
print(json.dumps(told))
