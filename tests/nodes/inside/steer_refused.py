"""steer_refused.py: what a person is told where Negative Steering cannot act; one line of JSON, name -> message."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import node_helpers
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_steering import KINDS, Probe, condition, noise_of, tiny, x0_of

from onestep.core.errors import OneStepError
from onestep.nodes.steer import NegativeSteeringNode

FIELDS = {"mode": "NASA", "scale": 0.0, "tau": 2.5, "alpha": 0.25, "start_percent": 0.0, "end_percent": 1.0}
NAN = float("nan")
MODELS = {kind: tiny(kind) for kind in ("sd15", "sdxl", "sd3", "flux", "z_image", "qwen_image")}
told = {}


def steered(kind, negative=None, **fields):
    model = MODELS.get(kind) or tiny(kind)
    negative = condition(kind, 5, 2) if negative is None else negative
    return NegativeSteeringNode.execute(model, negative, **{**FIELDS, **fields}).args[0]


def refused(name, act):
    try:
        act()
    except OneStepError as error:
        told[name] = str(error)
    else:
        told[name] = ""


def drawn(kind, patch=None, positive=None, mode="NASA"):
    clone = steered(kind, mode=mode)
    if patch is not None:
        patch(clone)
    x0_of(clone, condition(kind, 9, 1) if positive is None else positive)


def blind_decoder():
    """A U-Net of SD1.5's kind whose encoder alone looks at its text."""
    kind, layout = KINDS["sd15"]
    KINDS["encoder"] = kind, {**layout, "transformer_depth_output": [0, 0, 0, 0], "transformer_depth_middle": -1}
    return tiny("encoder")


# -- at the node ------------------------------------------------------------------------------------------------------

for kind in ("sd15", "sd3", "flux"):
    refused(f"width {kind}", lambda kind=kind: steered(kind, condition("sd2", 5, 2)))
refused("layers sd3", lambda: steered("sd3", layers="decoder"))
MODELS["encoder"] = blind_decoder()
refused("layers encoder", lambda: steered("encoder", condition("sd15", 5, 2), layers="decoder"))
refused("pooled", lambda: steered("sdxl", [[condition("sdxl", 5, 2)[0][0], {}]]))
refused("empty", lambda: steered("sd15", []))
PLACED = {"area": (8, 4, 0, 0), "mask": torch.ones(1, 8, 8), "strength": 0.5}
for key, value in PLACED.items():
    placed = node_helpers.conditioning_set_values(condition("sd15", 5, 2), {key: value})
    refused(key, lambda placed=placed: steered("sd15", placed))
refused("no empty text", lambda: steered("sd15", mode="PERP"))
refused("empty text's width", lambda: steered("sd15", mode="PERP", empty=condition("sd2", 5, 2)))
ranged = node_helpers.conditioning_set_values(condition("sd15", 5, 2), {"start_percent": 0.2, "end_percent": 0.7})
refused("empty text's range", lambda: steered("sd15", mode="PERP", empty=ranged))
refused("padded", lambda: steered("sd15", [[condition("sd15", 77, 2)[0][0], {}]], mode="VSF"))
OUT = {"scale": (NAN, float("inf"), -1.0, 101.0), "tau": (NAN, 0.5), "alpha": (NAN, 2.0)}
for field, values in {**OUT, "weight": (NAN, -1.0), "keep": (NAN, 101.0)}.items():
    for value in values:
        refused(f"{field} {value}", lambda field=field, value=value: steered("sd15", **{field: value}))
for start, end in ((0.5, 0.5), (0.7, 0.2), (NAN, 1.0), (0.0, NAN), (-0.1, 1.0)):
    refused(f"range {start} {end}", lambda start=start, end=end: steered("sd15", start_percent=start, end_percent=end))
twice = condition("sd15", 5, 2)
refused("twice", lambda: NegativeSteeringNode.execute(steered("sd15"), twice, **FIELDS))
for kind in ("numbered", "pixart alpha", "video unet"):
    refused(f"not served: {kind}", lambda kind=kind: steered(kind))

# -- in a run ---------------------------------------------------------------------------------------------------------


def dual():
    guider, noise = Guider_DualCFG(steered("sd15")), noise_of(MODELS["sd15"])
    guider.set_conds(*(condition("sd15", 9, seed) for seed in (1, 2, 3)))
    guider.set_cfg(3.0, 2.0)
    guider.sample(noise, torch.zeros_like(noise), Probe((0.1,)), torch.tensor([1.0, 0.0]), disable_pbar=True)


def longer(told, more):
    told["txt"] = torch.cat((told["txt"], told["txt"][:, :2]), 1)
    return more["original_block"](told)


def doubled_inside(q, context, value, options):
    return q.repeat(2, 1, 1), context.repeat(2, 1, 1), value.repeat(2, 1, 1)


masked = condition("flux", 9, 1)
masked[0][1] |= {"attention_mask": torch.zeros(1, 25, 25), "attention_mask_img_shape": (4, 4)}
with torch.inference_mode():
    refused("dual guider", dual)
    told_more = condition("z_image", 9, 1)
    told_more[0][1]["reference_latents"] = [noise_of(MODELS["z_image"])]
    refused("reference", lambda: drawn("z_image", positive=told_more))
    refused("masked", lambda: drawn("flux", positive=masked))
    filled = condition("qwen_image", 9, 1)
    filled[0][1]["attention_mask"] = (torch.arange(9) < 6)[None].long()
    refused("masked prompt", lambda: drawn("qwen_image", positive=filled))
    refused("style", lambda: drawn("flux", lambda model: model.set_model_patch(lambda told: told, "post_input")))
    longer_block = ("dit", "double_block", 0)
    for name, mode in (("tokens", "NASA"), ("tokens, vsf", "VSF")):
        refused(
            name, lambda mode=mode: drawn("sd3", lambda m: m.set_model_patch_replace(longer, *longer_block), mode=mode)
        )
    refused("batch", lambda: drawn("sd15", lambda model: model.set_model_attn2_patch(doubled_inside)))
    blind = lambda executor, x, *args, **kwargs: x  # noqa: E731
    refused("blind", lambda: drawn("flux", lambda model: model.add_wrapper(WrappersMP.DIFFUSION_MODEL, blind)))
print(json.dumps(told))
