"""negative_adapter.py FOLDER: a MODEL under a negative adapter, by ComfyUI's own guider, against the trainer's view."""

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
from onestep.core.negative_adapter import heads_of, new_adapter
from onestep.core.roles import Roles
from onestep.nodes.denoiser import ComfyDenoiser, schedule_of, with_sizes
from onestep.nodes.guidance_adapter import targets_of
from onestep.nodes.negative_adapter import model_away

SCALE, CFG = 1.5, 3.0


def made(model, path):
    """An adapter away from its start, and its file."""
    with torch.inference_mode(False):
        targets = {target.name: target for target in targets_of(model.model, "unet")}
        side = new_adapter(targets, "unet", heads_of([model.model.diffusion_model], targets), 1)
        draw = torch.Generator().manual_seed(2)
        for name, value in sorted(side.named_parameters()):
            spread = 0.3 if name.startswith(("alpha", "beta")) else 0.05
            value.detach().add_(spread * torch.randn(value.shape, generator=draw))
        save_adapter(path, side, "unet")
    return side


def by_the_trainer(model, side, positive, text):
    """x0 at the probe's level, by the denoiser that training asks."""
    comfy.model_management.load_models_gpu([model])
    base = model.model
    roles, schedule = Roles(targets_of(base, "unet")), schedule_of(base.model_sampling)
    roles.add_module("student", side)
    roles.install()
    sigma = torch.tensor([min(float(base.model_sampling.sigma_max), base.model_sampling.percent_to_sigma(0.1))])
    alpha = 1 / (1 + sigma.double() ** 2).sqrt()
    cond = with_sizes(Cond(positive[0][0], pooled=positive[0][1]["pooled_output"]), (64, 64))
    with roles.use("student", negative=Cond(text), scale=SCALE), torch.no_grad():
        x0 = ComfyDenoiser(base, schedule, roles, "cfg")(
            noise_of(model) * sigma * alpha.float(), sigma.double() * alpha, cond
        )
    roles.remove()
    return x0


def measured(kind, path):
    """Relative errors, and the adapter's effect."""
    model, positive, other = tiny(kind), condition(kind, 7, 1), condition(kind, 7, 2)
    first, second = condition(kind, 5, 3), condition(kind, 9, 4)
    side = made(model, path)
    plain, unasked = x0_of(model, positive)[0], x0_of(model, other)[0]
    ours, theirs = (model_away(model, negative, path, SCALE) for negative in (first, second))
    away = x0_of(ours, positive)[0]
    scale = float(away.std())

    def apart(a, b):
        return float((a - b).abs().max()) / scale

    def drawn(negative, batch=1):
        return x0_of(model_away(model, negative, path, SCALE), positive, noise=noise_of(model, batch))[0]

    found = {
        "effect": apart(away, plain),
        "the trainer's": apart(away, by_the_trainer(model, side, positive, first[0][0])),
    }
    found["another"] = apart(x0_of(theirs, positive)[0], away)
    found["plain again"], found["away again"] = (
        apart(x0_of(model, positive)[0], plain),
        apart(x0_of(ours, positive)[0], away),
    )
    found["off"] = apart(x0_of(model_away(model, first, path, 0.0), positive)[0], plain)
    # with CFG on, the adapter acts on the positive rows alone
    found["with CFG"] = apart(x0_of(ours, positive, other, CFG)[0], unasked + CFG * (away - unasked))
    # two texts together are one text; two negatives of a batch are each picture's own
    joined = [[torch.cat([first[0][0], second[0][0]], 1), first[0][1]]]
    found["combined"] = apart(drawn(first + second), drawn(joined))
    pair = condition(kind, 5, 5, batch=2)
    each = [drawn([[pair[0][0][row : row + 1], pair[0][1]]], 2)[row] for row in range(2)]
    found["of a batch"] = apart(drawn(pair, 2), torch.stack(each))
    hooks = [m for m in model.model.diffusion_model.modules() if m._forward_hooks or m._forward_pre_hooks]
    return found | {"hooks left": 0 if ours.is_injected or theirs.is_injected else len(hooks)}


def refusals(path):
    """What is said of an adapter of another base, of a dial out of range, and of negatives that cannot be honoured."""
    model, fits = tiny("sd15"), condition("sd15", 7, 1)
    made(model, path)
    twice = model_away(model, fits, path, 1.0)
    ranged = [[fits[0][0], {**fits[0][1], "start_percent": 0.2}]]
    said = []
    for given, negative, scale in (
        (tiny("sdxl"), condition("sdxl", 7, 1), 1.0),
        (tiny("sd3"), condition("sd3", 7, 1), 1.0),
        (model, fits, float("nan")),
        (model, fits, 11.0),
        (model, condition("sdxl", 7, 1), 1.0),
        (model, [], 1.0),
        (model, ranged, 1.0),
        (twice, fits, 1.0),
    ):
        try:
            model_away(given, negative, path, scale)
        except OneStepError as error:
            said.append(str(error))
    return said


with torch.inference_mode():
    place = Path(sys.argv[1]) / "adapter.safetensors"
    found = {kind: measured(kind, place) for kind in ("sd15", "sdxl")}
    print(json.dumps(found | {"said": refusals(place)}))
