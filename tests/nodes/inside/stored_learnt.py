"""stored_learnt.py FOLDER CHECKPOINT...: of a quantised base, what an update of an adapter on it changes; and the LoRA
that is saved of it, drawn with as hooks beside the weights and by core's loader, on the base and on its twin."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import comfy.sd
import comfy.utils
import small_modern
import small_z_image
import torch
from stored_networks import learnt, load, side, told, weights_of

from onestep.core.lora_file import save_lora
from onestep.core.recipe import Recipe
from onestep.nodes.adapt import adapted
from onestep.nodes.adapter_hooks import targets_of
from onestep.nodes.sample import OneStepSample
from onestep.nodes.step_loras import with_step_loras

FOLDER = Path(sys.argv[1])


def updated(path):
    """Whether an update moves the adapter, and nothing else; its file; the recipe of one step; what a text is."""
    with adapted(load(path), None, None) as host, host.training():
        roles, before = host.denoiser.roles, None
        *_, gradients = learnt(host)
        before = [weight.clone() for weight in weights_of(host.network)]
        factors = roles.parameters("student")
        old = [factor.detach().clone() for factor in factors]
        with torch.no_grad():
            for factor, gradient in zip(factors, gradients[1:], strict=True):
                factor -= 0.01 * gradient / gradient.norm().clamp_min(1e-6)
        moved = sum(not torch.equal(a, b) for a, b in zip(old, factors, strict=True)) / len(old)
        kept = all(torch.equal(a, b) for a, b in zip(before, weights_of(host.network), strict=True))
        file = FOLDER / "learnt.safetensors"
        grown = {name: (a, 4 * b) for name, (a, b) in roles.state("student").items()}
        save_lora(file, grown, host.family, host="comfyui")
        size, text = (side(host), side(host)), told(host, 1)
        recipe = Recipe.for_student(host.denoiser.schedule, 1, host.family, (size,))
        start = torch.zeros(1, *host.latent_shape(size))
        video = host.model.latent_format.latent_dimensions == 3
        return moved, kept, file, recipe, text, start.unsqueeze(2) if video else start


def drawn(model, recipe, text, start):
    return OneStepSample.execute(model, [[text.text, {}]], {"samples": start}, recipe, 3).args[0]["samples"]


def pictures(path, file, recipe, text, start):
    """With the LoRA as hooks, with it as core loads it, of the base; and the layers that were not called under it."""
    model, called = load(path), set()
    targets = targets_of(model.model, recipe.family)
    for target in targets:
        target.module.register_forward_hook(lambda *_, name=target.name: called.add(name))
    hooked, _ = with_step_loras(model, [file], recipe.family, recipe)
    loaded, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(file)), 1.0, 0.0)
    found = [drawn(hooked, recipe, text, start)]
    uncalled = sorted({target.name for target in targets} - called)
    found += [drawn(one, recipe, text, start) for one in (loaded, model)]
    return found, uncalled


def apart(mine, theirs, plain):
    """The difference of two pictures as a share of what the LoRA changes."""
    return float((mine - theirs).norm() / (theirs - plain).norm())


small_z_image.known()
small_modern.known()
for path in sys.argv[2:]:
    moved, kept, *more = updated(path)
    with torch.inference_mode():
        mine, uncalled = pictures(path, *more)
        twin, _ = pictures(path.replace(".safetensors", "_twin.safetensors"), *more)
    said = {
        **{"moved": moved, "kept": kept, "effect": float((twin[0] - twin[2]).norm() / twin[2].norm())},
        **{"base": float((mine[2] - twin[2]).norm() / twin[2].norm())},
        **{"hooked": apart(mine[0], twin[0], twin[2]), "loaded": apart(mine[1], twin[1], twin[2])},
        **{"loader": apart(twin[1], twin[0], twin[2]), "uncalled": uncalled},
    }
    print(json.dumps({path.split("/")[-1]: said}))
