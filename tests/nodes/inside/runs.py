"""runs.py FOLDER WORK: two whole runs in one process, as the node makes them; what is live, and what they leave."""

import gc
import json
import sys
from pathlib import Path

import comfy.model_management as management
import comfy.sample
import comfy.samplers
import torch

from onestep.core.lora_file import load_lora
from onestep.nodes.adapt import adapted
from onestep.nodes.tiny_models.model import load_tiny
from onestep.training.distil import distil
from onestep.training.presets import preset

FOLDER, WORK = Path(sys.argv[1]), Path(sys.argv[2])
SMALL = {
    "warm_start": 1,
    "critic_warm_up": 1,
    "critic_updates": 1,
    "batch": 2,
    "pairs": 2,
    "teacher_steps": 2,
    "steps": 2,
}
SMALL |= {"watch_every": 2, "watch_samples": 4, "preview_every": 2, "preview_samples": 1, "rank": 2, "sizes": "32x32"}
PROMPTS = ["a red dragon", "a wall"]


def storages():
    """Bytes of every live storage, by address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and type(thing) is not torch._subclasses.FakeTensor:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def draw(model, clip):
    positive = clip.encode_from_tokens_scheduled(clip.tokenize("a red dragon"))
    latent = torch.zeros(1, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 3)
    return comfy.sample.sample(model, noise, 2, 2.0, "euler", "simple", positive, positive, latent, seed=3).clone()


def run(model, clip, vae, name):
    """As the node's execute; the live bytes at each update."""
    live = []
    with adapted(model, clip, vae) as host:
        base = {weight.untyped_storage().data_ptr() for weight in host.network.parameters()}
        count = sum(weight.untyped_storage().nbytes() for weight in host.network.parameters())

        def report(progress):
            if progress.preparing:
                return
            found = storages()
            factors = host.denoiser.roles
            adapters = sum(p.untyped_storage().nbytes() for role in factors.names() for p in factors.parameters(role))
            same = base == {weight.untyped_storage().data_ptr() for weight in host.network.parameters()}
            live.append(
                {"total": sum(found.values()), "adapters": adapters, "roles": len(factors.names()), "same": same}
            )

        result = distil(host, PROMPTS, preset("Balanced", **SMALL), WORK / name, existing="stop", report=report)
        path = result.path
    return path, live, count


with torch.inference_mode():
    model, clip, vae = load_tiny(FOLDER)
    before, at_start = draw(model, clip), sum(storages().values())
    first = run(model, clip, vae, "first")
    after_one = sum(storages().values())
    second = run(model, clip, vae, "second")
    after_two = sum(storages().values())
    after = draw(model, clip)
    left = [
        type(loaded.model.model).__name__ for loaded in management.current_loaded_models if loaded.model is not None
    ]

states = [load_lora(path).state for path, _, _ in (first, second)]
print(
    json.dumps(
        {
            **{"unchanged": bool(torch.equal(before, after)), "start": at_start, "one": after_one, "two": after_two},
            **{"live": first[1], "base": first[2], "in_training": management.in_training, "left": left},
            "equal_runs": all(
                torch.equal(a, b) for n in states[0] for a, b in zip(states[0][n], states[1][n], strict=True)
            ),
        }
    )
)
