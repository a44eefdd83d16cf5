"""control_joint.py WORK: a control adapter as a CONTROL_NET of a transformer, against the same adapter as a side."""

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
from onestep.core.adapter_module import Call
from onestep.core.control import new_adapter
from onestep.core.families import bind_comfy
from onestep.core.role_map import RoleMap
from onestep.core.roles import Roles
from onestep.nodes.control import LoadControlAdapter

WORK = Path(sys.argv[1])
folder_paths.add_model_folder_path("controlnet", str(WORK))
EMBED = {"sd3": "x_embedder", "flux": "img_in", "flux2": "img_in", "z_image": "x_embedder", "qwen_image": "img_in"}


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


class Case:
    """A model, an adapter for it and a control picture, and what it draws with them in several ways."""

    def __init__(self, family):
        self.family, self.model = family, tiny(family)
        self.positive, self.negative = condition(family, 7, 1), condition(family, 7, 2)
        self.network, shape = self.model.model.diffusion_model, shape_of(self.model)
        self.shape = (shape[0], *shape[-2:])  # of one frame
        config = self.model.model.model_config.unet_config
        self.targets = {target.name: target for target in bind_comfy(family, self.network, config)}
        self.side = made(self.targets, family, self.shape)
        self.image = torch.rand(1, 64, 64, 1, generator=torch.Generator().manual_seed(5)).expand(-1, -1, -1, 3)
        self.plain = x0_of(self.model, self.positive)[0]

    def apart(self, a, b):
        return float((a - b).abs().max()) / float(self.plain.std())

    def controlled(self, strength=1.0, span=(0.0, 1.0), over=None, picture=None, new=False):
        """(positive, negative) under the adapter's file, by core's node."""
        net = LoadControlAdapter.execute(f"{self.family}{'-new' * new}.safetensors").args[0]
        picture = self.image if picture is None else picture
        over = over or (self.positive, self.negative)
        return ControlNetApplyAdvanced().apply_controlnet(*over, net, picture, strength, *span)

    def by_adapter(self, strength=1.0, cfg=1.0, given=None):
        """x0 with the adapter hung on the layer itself, as in training."""
        roles = Roles(list(self.targets.values()))
        roles.add_module("control", self.side)
        call = Call(None, None, {"control": channel(self.image), "strength": strength})
        with roles.installed(), roles.serving(RoleMap((("control", None),), call=call)):
            return x0_of(given or self.model, self.positive, self.negative, cfg)[0]

    def by_hook(self, noise, control, conds):
        """x0 where the features are added to the embedded picture by a hook of this test."""
        cell = 8 * self.model.model.diffusion_model.patch_size
        grid = control.shape[2] // cell, control.shape[3] // cell

        def add(module, given, out):
            x = given[0]
            if x.ndim == 3:  # Flux embeds tokens; those of a reference come last
                x = x[:, : grid[0] * grid[1]].transpose(1, 2).unflatten(2, grid)
            else:
                x = torch.nn.functional.pixel_unshuffle(comfy.ldm.common_dit.pad_to_patch_size(x), 2)
            feature = self.side(control, x)[0].flatten(2).transpose(1, 2)
            return torch.cat((out[:, : feature.shape[1]] + feature, out[:, feature.shape[1] :]), 1)

        handle = getattr(self.network, EMBED[self.family]).register_forward_hook(add)
        try:
            return x0_of(self.model, conds, noise=noise)[0]
        finally:
            handle.remove()


def channel(image):
    """[B, 1, H, W] of an IMAGE."""
    return image[..., :1].movedim(-1, 1)


def measured(case):
    model, controlled, apart = case.model, case.controlled, case.apart
    full, part = (x0_of(model, controlled(strength)[0])[0] for strength in (1.0, 0.7))
    both = controlled(0.3, over=controlled(0.4))
    foreign = model.clone()
    foreign.set_model_patch_replace(doubled, "dit", "double_block", 0)
    odd = torch.randn(1, case.shape[0], 7, 5, generator=torch.Generator().manual_seed(6))
    small = case.image[:, :56, :40] if case.network.patch_size == 1 else case.image[:, :, :48]
    return {
        "effect": apart(full, case.plain),
        "side": max(apart(full, case.by_adapter()), apart(part, case.by_adapter(0.7))),
        "side, CFG": apart(x0_of(model, *controlled(0.7), 3.0)[0], case.by_adapter(0.7, 3.0)),
        "two": apart(x0_of(model, both[0])[0], case.by_adapter(0.7)),
        "new": torch.equal(x0_of(model, controlled(new=True)[0])[0], case.plain),
        "late": apart(x0_of(model, controlled(span=(0.0, 0.3))[0])[0], case.plain),
        "early": apart(x0_of(model, controlled(span=(0.3, 1.0))[0])[0], case.plain),
        "replacement": apart(x0_of(foreign, controlled()[0])[0], full),
        "replaced": apart(x0_of(foreign, controlled()[0])[0], case.by_adapter(given=foreign)),
        "odd": apart(
            x0_of(model, controlled(picture=small)[0], noise=odd)[0], case.by_hook(odd, channel(small), case.positive)
        ),
        "after": torch.equal(x0_of(model, case.positive)[0], case.plain),
    }


def beside_reference(case):
    """A model told a reference picture: the features are the drawn picture's alone."""
    text, more = case.positive[0]
    seen = [[text, {**more, "reference_latents": [noise_of(case.model, side=4)]}]]
    found = x0_of(case.model, case.controlled(over=(seen, case.negative))[0])[0]
    return case.apart(found, case.by_hook(noise_of(case.model), channel(case.image), seen))


with torch.inference_mode():
    cases = {family: Case(family) for family in EMBED}
    told = {family: measured(case) for family, case in cases.items() if family != "qwen_image"}
    told["reference"] = max(beside_reference(cases[family]) for family in ("flux", "flux2", "qwen_image"))
print(json.dumps(told))
