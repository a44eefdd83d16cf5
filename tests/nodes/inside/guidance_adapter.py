"""guidance_adapter.py FOLDER: a MODEL under a guidance adapter, by ComfyUI's own guider, against the trainer's view."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import comfy.model_management
import torch
from comfy_steering import condition, noise_of, tiny, x0_of

from onestep.core.adapter_file import save_adapter
from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.guidance_adapter import new_adapter, with_guidance
from onestep.core.roles import Roles
from onestep.core.schedule import FlowSchedule
from onestep.nodes.denoiser import ComfyDenoiser, in_front, schedule_of, with_sizes
from onestep.nodes.guidance_adapter import guided_model, targets_of

FAMILIES = {"sd15": "unet", "sdxl": "unet", "sd3": "sd3", "z_image": "z_image", "klein": "flux2"}
W, CFG = 5.0, 3.0


def made(model, family, path):
    """An adapter away from its start, and its file."""
    with torch.inference_mode(False):
        side = new_adapter({target.name: target for target in targets_of(model.model, family)}, family, 1)
        draw = torch.Generator().manual_seed(2)
        for _, value in sorted(side.named_parameters()):
            value.detach().add_(0.1 * torch.randn(value.shape, generator=draw))
        save_adapter(path, side, family)
    return side


def by_the_trainer(model, family, side, positive):
    """x0 at the probe's level, by the denoiser that training asks."""
    comfy.model_management.load_models_gpu([model])
    base = model.model
    roles, schedule = Roles(targets_of(base, family)), schedule_of(base.model_sampling)
    roles.add_module("student", side)
    roles.install()
    sigma = torch.tensor([min(float(base.model_sampling.sigma_max), base.model_sampling.percent_to_sigma(0.1))])
    x, level = noise_of(model) * sigma, sigma.double()
    if not isinstance(schedule, FlowSchedule):
        alpha = 1 / (1 + level**2).sqrt()
        x, level = x * alpha.float(), level * alpha
    pooled = None if family in ("z_image", "flux2") else positive[0][1]["pooled_output"]
    cond = with_sizes(Cond(positive[0][0], pooled=pooled), (64, 64))
    cond = in_front(cond, 512) if family == "flux2" else cond
    cond = with_guidance(cond, W)
    with roles.use("student"), torch.no_grad():
        x0 = ComfyDenoiser(base, schedule, roles, "cfg")(x, level, cond)
    roles.remove()
    return x0


def measured(kind, family, path):
    """Relative errors, and the adapter's effect."""
    model, positive, negative = tiny(kind), condition(kind, 7, 1), condition(kind, 7, 2)
    side = made(model, family, path)
    plain = x0_of(model, positive)[0]
    model_guided = guided_model(model, path, W)
    guided = x0_of(model_guided, positive)[0]
    other = x0_of(model, negative)[0]
    scale = float(guided.std())

    def apart(a, b):
        return float((a - b).abs().max()) / scale

    hooks = [m for m in model.model.diffusion_model.modules() if m._forward_hooks or m._forward_pre_hooks]
    return {
        "effect": apart(guided, plain),
        "the trainer's": apart(guided, by_the_trainer(model, family, side, positive)),
        "plain again": apart(x0_of(model, positive)[0], plain),
        "guided again": apart(x0_of(model_guided, positive)[0], guided),
        "off": apart(x0_of(guided_model(model, path, 1.0), positive)[0], plain),
        "with CFG": apart(x0_of(model_guided, positive, negative, CFG)[0], other + CFG * (guided - other)),
        "hooks left": len(hooks) if not model_guided.is_injected else 0,
    }


def refusals(path):
    """What is said of an adapter of another base, and of a dial out of range."""
    made(tiny("sd15"), "unet", path)
    said = []
    for kind, guidance in (("sdxl", 4.0), ("sd3", 4.0), ("sd15", float("nan")), ("sd15", 0.5)):
        try:
            guided_model(tiny(kind), path, guidance)
        except OneStepError as error:
            said.append(str(error))
    return said


with torch.inference_mode():
    place = Path(sys.argv[1]) / "adapter.safetensors"
    found = {kind: measured(kind, family, place) for kind, family in FAMILIES.items()}
    print(json.dumps(found | {"said": refusals(place)}))
