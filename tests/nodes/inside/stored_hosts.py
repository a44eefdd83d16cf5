"""stored_hosts.py CHECKPOINT... [--fp8] [--loras]: a quantised base as a host, against its twin and what is drawn.

--loras: with two LoRAs plugged onto it, and that alone.
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import comfy.model_management as management
import comfy.sd
import small_modern
import small_z_image
import stored_networks
import torch
from stored_networks import load, side, stored, told

from onestep.core.roles import Roles
from onestep.nodes.adapt import adapted
from onestep.nodes.denoiser import ComfyDenoiser

OPTIONS = {"dtype": torch.float8_e4m3fn} if "--fp8" in sys.argv else {}
PATHS = [path for path in sys.argv[1:] if not path.startswith("--")]


def learnt(model):
    """D of a student and of the teacher, and the gradients of a sum over D; how it is stored, and its hash."""
    with adapted(model, None, None) as host, host.training():
        return *stored_networks.learnt(host), stored(host.network), host.base_hash


def predicted(model):
    """One prediction of the teacher in training, and of the plugged MODEL itself."""
    with torch.inference_mode():
        with adapted(model, None, None) as host:
            cond, sigma = told(host, 2), host.denoiser.schedule.sigma_of_time(torch.tensor([900.0, 200.0]).double())
            shape = host.latent_shape((side(host), side(host)))
            x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(4))
            with host.training(), torch.no_grad():
                ours = host.denoiser(x, sigma, cond)
            schedule, guidance = host.denoiser.schedule, host.denoiser.guidance
        management.load_models_gpu([model])
        return ours, ComfyDenoiser(model.model, schedule, Roles([]), guidance)(x, sigma, cond)


def drawn(model):
    """Their relative difference."""
    ours, theirs = predicted(model)
    return float((ours - theirs).norm() / theirs.norm())


def with_loras(model):
    """As two of core's LoRA loaders make it: on every linear layer of its blocks, the second at half strength."""
    draw, stacked = torch.Generator().manual_seed(5), model
    layers = [(n, m) for n, m in model.model.diffusion_model.named_modules() if hasattr(m, "in_features")]
    for strength in (1.0, 0.5):
        state = {}
        for name, layer in layers:
            for part, shape in (("lora_up", (layer.out_features, 2)), ("lora_down", (2, layer.in_features))):
                key = f"diffusion_model.{name}.{part}.weight"
                state[key] = torch.randn(shape, generator=draw) * 0.3 * shape[1] ** -0.5
        with torch.inference_mode():
            stacked, _ = comfy.sd.load_lora_for_models(stacked, None, state, strength, 0.0)
    assert len(stacked.patches) >= len(layers) and all(len(found) == 2 for found in stacked.patches.values())
    return stacked


def stacked(path):
    """Of the LoRAs: their effect, how far training's teacher is from what is drawn as a share of it, what is stored
    afterwards, whether the bases are told apart, and what is left of them on the plain MODEL."""
    model = load(path)
    plain = predicted(model)[1]
    ours, theirs = predicted(with_loras(model))
    with adapted(with_loras(load(path)), None, None) as host, host.training():
        with torch.inference_mode():
            management.unload_all_models()  # as a VAE does that needs the room
        host._load()
        kept, hashed = stored(host.network), host.base_hash
    with adapted(with_loras(load(path)), None, None) as again, adapted(load(path), None, None) as bare:
        known = [again.base_hash == hashed, bare.base_hash != hashed]
    size = float((theirs - plain).norm())
    return {"effect": size / float(plain.norm()), "apart": float((ours - theirs).norm()) / size} | {
        "stored": kept,
        "known": known,
        "again": float((predicted(model)[1] - plain).norm()),
    }


def apart(mine, other):
    return float((mine - other).abs().max() / other.abs().max().clamp_min(1e-30))


small_z_image.known()
small_modern.known()
for path in PATHS:
    if "--loras" in sys.argv:
        print(json.dumps({path.split("/")[-1]: stacked(path)}))
        continue
    mine = learnt(load(path, OPTIONS))
    twin = learnt(load(path.replace(".safetensors", "_twin.safetensors")))
    scale = max(float(g.abs().max()) for g in twin[2][1:])
    said = {
        "teacher": apart(mine[0], twin[0]),
        "student": apart(mine[1], twin[1]),
        "x": apart(mine[2][0], twin[2][0]),
        "factors": max(float((a - b).abs().max()) / scale for a, b in zip(mine[2][1:], twin[2][1:], strict=True)),
        "stored": mine[3],
        "drawn": drawn(load(path, OPTIONS)),
        "hash": mine[4] == learnt(load(path, OPTIONS))[4],
    }
    print(json.dumps({path.split("/")[-1]: said}))
